"""Compiled models in files: packed weights, their description, and the checks of both."""
