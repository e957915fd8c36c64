"""What machine code computes, one kernel at a time, and how kernels are called."""
