"""Compressed checkpoints: saving, loading through transformers, and inspecting."""
