"""Plausible mistakes in the conformance kit: its cases, its files, and what it lets pass."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

_TESTS = "test_conformance.py -k"
_RUNNER = "alibi_verify/conformance.py"
_KIT = "alibi_spec/conformance"

FAULTS = (
    Mutant(
        "the kit's reference forgets the padding of earlier parts",
        f"{_KIT}/reference.py",
        "cache.extended(trace, mask)",
        "cache.extended(trace)",
        f"{_TESTS} 'what_the_reference_says and quick'",
    ),
    Mutant(
        "the kit's reference puts elements in Flax's shape without moving them",
        f"{_KIT}/reference.py",
        "split.transpose([torch_axes.index(axis) for axis in flax_axes])",
        "split.reshape(row.flax_shape)",
        f"{_TESTS} 'what_the_reference_says and quick'",
    ),
    Mutant(
        "differences of the second order",
        f"{_KIT}/differences.py",
        "(8 * (right - left) - (far_right - far_left)) / (12 * STEP)",
        "(right - left) / (2 * STEP)",
        f"{_TESTS} what_the_reference_says",
    ),
    Mutant(
        "a parameter stays moved while the next one is",
        f"{_KIT}/differences.py",
        "            array[index] = centre\n",
        "",
        f"{_TESTS} what_the_reference_says",
    ),
    Mutant(
        "a damaged file of the kit is read",
        f"{_KIT}/files.py",
        'if found != row["sha256"]:',
        "if not found:",
        f"{_TESTS} damaged",
    ),
    Mutant(
        "what must be exact may be rounded",
        _RUNNER,
        "return relative_error(value, expected), 0.0",
        "return relative_error(value, expected), budget.forward",
        f"{_TESTS} wrong_is_said",
    ),
    Mutant(
        "an update beside the weights",
        _RUNNER,
        "moves = {key: case.expected[key] - array for key, array in before.items()}",
        "moves = {key: case.expected[key] - 0 * array for key, array in before.items()}",
        f"{_TESTS} thousandth",
    ),
    Mutant(
        "intermediates of a model are not compared",
        _RUNNER,
        "for name in case.expected if name in found}",
        "for name in list(case.expected)[-1:]}",
        f"{_TESTS} logits_are_enough",
    ),
    Mutant(
        "a refused configuration counts as passed",
        _RUNNER,
        'return "conforms in part" if "refused" in statuses else "conforms"',
        'return "conforms"',
        f"{_TESTS} third_party_conforms",
    ),
    Mutant(
        "a run without a result passes",
        _RUNNER,
        'return "failed" not in statuses and "ok" in statuses',
        'return "failed" not in statuses',
        f"{_TESTS} all_refused",
    ),
    Mutant(
        "a level that is asked for and missing is passed over",
        _RUNNER,
        "for level in levels or ():",
        "for level in ():",
        f"{_TESTS} implementations_that_are_refused",
    ),
    Mutant(
        "the largest error is sought where there is none",
        _RUNNER,
        "np.nan_to_num(deviation, nan=np.inf).argmax()",
        "np.nan_to_num(deviation, nan=0).argmax()",
        f"{_TESTS} wrong_is_said",
    ),
    Mutant(
        "results that nobody asked for are not seen",
        _RUNNER,
        "[name for name in found if name not in case.expected]",
        "[name for name in () if name not in case.expected]",
        f"{_TESTS} names_are_compared",
    ),
    Mutant(
        "arrays of a mapping lose their mapping on the way to a program",
        "alibi_verify/programs.py",
        'f"{name}/{entry}": array for',
        "entry: array for",
        f"{_TESTS} a_program_conforms",
    ),
    Mutant(
        "a program that has ended is asked on",
        "alibi_verify/programs.py",
        "        if not line:\n",
        "        if False:\n",
        f"{_TESTS} misbehave",
    ),
)
