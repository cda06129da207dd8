"""Fused kernels in Triton, which replace the plain form of a function on a GPU."""
