"""Kernels that compute only certified windows: one operator, passes by technology."""
