"""Sparsity learned while training: proximal steps inside any optimizer, and what drives them."""
