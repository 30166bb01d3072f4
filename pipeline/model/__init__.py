"""The CNN: its layers, training and metrics. Imports PyTorch and Numba, and no other part of this project."""
