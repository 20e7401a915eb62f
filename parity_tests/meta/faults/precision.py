"""Faults in what makes float32 mean float32, and in the emulation of other devices."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

FAULTS = (
    Mutant(
        "precision: the old interface of torch is forgotten",
        "alibi_torch/precision.py",
        '        _set_old_setting("highest")\n',
        "",
        "test_precision.py -k goes_back",
    ),
    Mutant(
        "precision: torch keeps as its own what a library had followed",
        "alibi_torch/precision.py",
        '        _own._set_fp32_precision_setter(*setting, "none")\n',
        "",
        "test_precision.py -k goes_back",
    ),
    Mutant(
        "precision: sums that may be split are not split afterwards",
        "alibi_torch/precision.py",
        "(allowed, *split) if split else allowed",
        "allowed",
        "test_precision.py -k goes_back",
    ),
    Mutant(
        "precision: in JAX the middle level",
        "alibi_flax/precision.py",
        '"highest"',
        '"high"',
        "test_precision.py -k asks",
    ),
    Mutant(
        "precision: a step's weighted values are left to the device",
        "alibi_flax/kernels/decode.py",
        "probabilities, value, precision=HIGHEST)",
        "probabilities, value)",
        "test_precision.py -k asks",
    ),
    Mutant(
        "precision: dense attention's weighted values are left to the device",
        "alibi_flax/kernels/dense.py",
        "probabilities, value, precision=HIGHEST)",
        "probabilities, value)",
        "test_precision.py -k asks",
    ),
    Mutant(
        "emulation: a part has a bit too many",
        "alibi_verify/emulation.py",
        "algorithm.bits - 1",
        "algorithm.bits",
        "test_precision.py -k emulated_products",
    ),
    Mutant(
        "emulation: a product that asks for the highest precision gets the default",
        "alibi_verify/emulation.py",
        '[options["precision"] == highest]',
        "[False]",
        "test_precision.py -k explained",
    ),
    Mutant(
        "emulation: products in loops are passed over",
        "alibi_verify/emulation.py",
        "elif any(map(_has_products, options.values())):",
        "elif False:",
        "test_precision.py -k escape",
    ),
)
