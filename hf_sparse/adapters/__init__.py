"""PEFT adapters that keep zeros."""
