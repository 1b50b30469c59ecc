"""The arena: every method on the same small tasks with real models, beside full fine-tuning, a head alone, TF-IDF and the reference library."""
