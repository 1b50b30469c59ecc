"""How each method stands in a file. A method of the reference library has its own module here; every other one gets `generic`."""
