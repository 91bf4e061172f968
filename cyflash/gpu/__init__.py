"""Attention on the GPU, for arrays that live there. Nothing in here imports CuPy before such an array arrives."""
