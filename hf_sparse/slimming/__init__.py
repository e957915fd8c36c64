"""One budget over depth and width: which mix of fewer and smaller blocks a model misses least."""
