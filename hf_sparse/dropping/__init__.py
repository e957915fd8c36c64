"""Whole parts leave a model: blocks, experts, features of the hidden size."""
