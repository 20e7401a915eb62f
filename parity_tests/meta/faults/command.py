"""Faults planted in the `alibi` command."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

FAULTS = (
    Mutant(
        "a proof that fails with exit code 0",
        "alibi_cli/commands/verify.py",
        "return OK if result.passed else MISMATCH",
        "return OK",
        "test_command_line.py -k command_line",
    ),
    Mutant(
        "a plan that cannot be carried out with exit code 0",
        "alibi_cli/commands/plan.py",
        "return OK if planned.possible else BROKEN",
        "return OK",
        "test_plan.py",
    ),
    Mutant(
        "keys that are not turned in the demo's Flax models",
        "alibi_cli/demo/positions.py",
        'context.module.name not in ("query", "key")',
        'context.module.name not in ("query",)',
        "test_demo.py -k test_demo",
    ),
    Mutant(
        "a rotation by fixed angles in the demo",
        "alibi_cli/demo/positions.py",
        "angle = angles(seq, head_dim)[None, :, None, :]",
        "angle = 0 * angles(seq, head_dim)[None, :, None, :]",
        "test_demo.py -k positions",
    ),
)
