"""Experiments with positions on real text: `alibi demo` and `alibi extrapolate`.

Positions other than ALiBi exist here alone, for comparison.
"""
