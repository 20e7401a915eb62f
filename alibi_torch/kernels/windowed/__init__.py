"""Kernels that compute only what lies in certified windows: one operator, passes by technology."""
