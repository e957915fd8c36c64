"""One-shot pruning: zeros chosen after training."""
