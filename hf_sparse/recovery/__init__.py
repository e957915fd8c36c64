"""How a pruned model is trained while its zeros stay: methods, the loop, held-out batches, rates."""
