"""One knob: how much effort a sparse model is worth, turned into stages of pruning and recovery."""
