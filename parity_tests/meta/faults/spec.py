"""Plausible mistakes in the specification: configurations, slopes, parameters, windows."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

FAULTS = (
    Mutant(
        "paper slopes wrong beyond powers of two",
        "alibi_spec/biases.py",
        "range(1, 2 * (num_heads - power), 2)",
        "range(1, num_heads - power + 1)",
        "test_config.py",
    ),
    Mutant(
        "heads and head_dim exchanged",
        "alibi_spec/parameters.py",
        '"({heads} head_dim) embed -> embed {heads} head_dim"',
        '"(head_dim {heads}) embed -> embed {heads} head_dim"',
        "test_parameters.py -k tracer",
    ),
    Mutant(
        "square matrices not transposed",
        "alibi_spec/parameters.py",
        'ffn.fc1", "mlp embed -> embed mlp"',
        'ffn.fc1", "embed mlp -> embed mlp"',
        "test_parameters.py -k tracer",
    ),
    Mutant(
        "seed scale by head_dim",
        "alibi_spec/config.py",
        "1 / math.sqrt(d_model)",
        "1 / math.sqrt(d_model / 4)",
        "test_seed.py",
    ),
    Mutant(
        "slopes interpolated too early",
        "alibi_spec/biases.py",
        "limit / max(limit, key_len)",
        "limit / key_len",
        "test_config.py -k interpolation",
    ),
    Mutant(
        "far keys counted once",
        "alibi_spec/certificate.py",
        "series = -np.log(",
        "series = -0 * np.log(",
        "test_windows.py",
    ),
    Mutant(
        "the whole tolerance granted to either side",
        "alibi_spec/certificate.py",
        "allowed_mass if causal else allowed_mass / 2",
        "allowed_mass",
        "test_windows.py",
    ),
    Mutant(
        "a certificate without a slope",
        "alibi_spec/certificate.py",
        " & falls",
        "",
        "test_windows.py",
    ),
    Mutant(
        "an anchor that the query does not see",
        "alibi_spec/certificate.py",
        "is_anchored = same_segment & (anchor >= 0)",
        "is_anchored = anchor >= 0",
        "test_windows.py",
    ),
    Mutant(
        "the layout is guessed before the slopes are counted",
        "alibi_spec/checks.py",
        "if [heads] != list(slopes_shape) == [query_len]:",
        "if list(slopes_shape) == [query_len] != [heads]:",
        "test_kernel_export.py -k exports_for_any",
    ),
    Mutant(
        "the share of no blocks",
        "alibi_spec/certificate.py",
        "max(1, allowed.sum())",
        "allowed.sum()",
        "test_kernel_plans.py -k plans_of_nothing",
    ),
    Mutant(
        "equal models with other configurations",
        "alibi_spec/config.py",
        "if self.num_kv_heads == self.num_heads:",
        "if self.num_kv_heads == 0:",
        "test_config.py -k equal_models",
    ),
)
