"""Weights in the order in which kernels read them, and the kernel that each is given to."""
