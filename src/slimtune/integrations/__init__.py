"""Other libraries, met half-way: what must be told to them so that they carry adapters."""
