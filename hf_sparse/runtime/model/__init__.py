"""transformers models: what is compiled of them, what is refused, and a packed stack as arrays."""
