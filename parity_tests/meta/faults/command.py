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
    Mutant(
        "texts are read without the special tokens of their tokenizer",
        "alibi_cli/tokens.py",
        "self.tokenizer.encode(text).ids",
        "self.tokenizer.encode(text, add_special_tokens=False).ids",
        "test_inference_commands.py -k test_encode",
    ),
    Mutant(
        "vectors keep their length unless asked to",
        "alibi_cli/commands/encode.py",
        '"normalize": not options.no_normalize',
        '"normalize": options.no_normalize',
        "test_inference_commands.py -k test_encode",
    ),
    Mutant(
        "vectors are compared by their products",
        "alibi_cli/rendering.py",
        "wide @ wide.T / lengths / lengths[:, None]",
        "wide @ wide.T / lengths[0] ** 2",
        "test_inference_commands.py -k compares",
    ),
    Mutant(
        "vectors replace a file that is there",
        "alibi_cli/commands/encode.py",
        "options.overwrite)",
        "True)",
        "test_inference_commands.py -k never",
    ),
    Mutant(
        "a shorter text with masks sees the padding",
        "alibi_cli/commands/fill.py",
        "np.arange(tokens.shape[1]) < lengths[:, None]",
        "np.arange(tokens.shape[1]) < tokens.shape[1] + 0 * lengths[:, None]",
        "test_inference_commands.py -k test_fill",
    ),
    Mutant(
        "masks of every batch belong to the first texts",
        "alibi_cli/commands/fill.py",
        "results[places[row]]",
        "results[row]",
        "test_inference_commands.py -k test_fill",
    ),
    Mutant(
        "special tokens that may fill a mask have no text",
        "alibi_cli/tokens.py",
        "decode([token], skip_special_tokens=False)",
        "decode([token])",
        "test_inference_commands.py -k test_fill",
    ),
    Mutant(
        "a folder's own name for a mask is passed over",
        "alibi_cli/tokens.py",
        "for name in _SETTINGS",
        "for name in ()",
        "test_inference_commands.py -k stands_for",
    ),
)
