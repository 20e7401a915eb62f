"""Plausible mistakes in the tests' own comparison."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

FAULTS = (
    Mutant(
        "a float64 result in a float32 test",
        "parity_tests/compare.py",
        "if actual.dtype != (dtype or expected.dtype):",
        "if dtype is None and actual.dtype != expected.dtype:",
        "meta/test_compare.py -k within_sees_shapes",
    ),
    Mutant(
        "a trace that lacks a layer",
        "parity_tests/compare.py",
        "    _assert_names(actual, shown, what)\n",
        "    shown = [name for name in shown if name in actual]\n",
        "meta/test_compare.py -k trace",
    ),
    Mutant(
        "errors of one implementation that lack a layer",
        "parity_tests/compare.py",
        "        _assert_names(found, names, implementation)\n",
        "        pass\n",
        "meta/test_compare.py -k comparable",
    ),
    Mutant(
        "nothing compared",
        "parity_tests/compare.py",
        "    if not expected:\n",
        "    if expected is None:\n",
        "meta/test_compare.py",
    ),
    Mutant(
        "a comparison that compares nothing",
        "parity_tests/compare.py",
        "    if not error <= relative:",
        "    if error > 1e9 * relative:",
        "meta/test_compare.py",
    ),
    Mutant(
        "a new option is not drawn",
        "parity_tests/random_configurations.py",
        '    "activation": st.sampled_from(ACTIVATIONS),\n',
        "",
        "test_random_configurations.py -k every_option",
    ),
    Mutant(
        "any refusal of a kernel is believed",
        "parity_tests/random_configurations.py",
        "            implementation in ELSEWHERE\n",
        "            True\n",
        "test_random_configurations.py -k needs_a_reason",
    ),
    Mutant(
        "the call is missing from what shows a failure again",
        "parity_tests/random_configurations.py",
        "json.dumps(dataclasses.asdict(call))",
        "json.dumps({})",
        "test_random_configurations.py -k see_it_again",
    ),
    Mutant(
        "any pair may be refused",
        "parity_tests/pairs.py",
        "and writer.family != reader.family",
        "or True",
        "test_pairs.py -k BLOOM",
    ),
    Mutant(
        "a reader of the table whom nobody tries",
        "parity_tests/pairs.py",
        '    Party("orbax"),\n',
        '    Party("orbax"),\n    Party("ONNX"),\n',
        "test_pairs.py -k takes_part",
    ),
    Mutant(
        "survivors are recorded as caught",
        "parity_tests/meta/mutants.py",
        '"caught" if trouble is None else "survived"',
        '"caught"',
        "meta/test_faults.py -k recorded",
    ),
    Mutant(
        "a report of devices in which every test passed",
        "parity_tests/device_report.py",
        '"outcome": report.outcome',
        '"outcome": "passed"',
        "test_devices.py -k report_says",
    ),
    Mutant(
        "a report of devices without what was skipped",
        "parity_tests/device_report.py",
        'if report.when == "call" or report.outcome != "passed":',
        'if report.when == "call":',
        "test_devices.py -k report_says",
    ),
)
