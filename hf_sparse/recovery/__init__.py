"""Recovery: training a sparse model, or adapters for it, so that its zeros stay."""
