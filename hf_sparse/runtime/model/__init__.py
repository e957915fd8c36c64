"""transformers models: what is compiled of them, what is refused, and compiled models in files."""
