"""Faults in what compares implementations and explains their differences."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

FAULTS = (
    Mutant(
        "parity: the last tensor past its budget is called the first",
        "alibi_verify/parity.py",
        "in errors.items() if not error <= budget",
        "in reversed(list(errors.items())) if not error <= budget",
        "test_parity.py -k planted",
    ),
    Mutant(
        "parity: what leaves the budget is no failure",
        "alibi_cli/commands/parity.py",
        "return OK if passed else MISMATCH",
        "return OK",
        "test_parity.py -k command_of_a_fault",
    ),
    Mutant(
        "parity: the head and the token of logits are exchanged",
        "alibi_verify/parity.py",
        "row, head, position, key = where",
        "row, position, head, key = where",
        "test_parity.py -k place",
    ),
    Mutant(
        "parity: the reference of a narrow dtype has wide parameters",
        "alibi_verify/parity.py",
        "tensors = narrowed(config, parity.ours.tensors, dtype)",
        "tensors = parity.ours.tensors",
        "test_parity.py -k narrow_copies",
    ),
    Mutant(
        "parity: logits of padding are asked of a family's library",
        "alibi_verify/parity.py",
        'np.where(real, logits, truth.exact["logits"])',
        "logits",
        "test_parity.py -k right_model",
    ),
    Mutant(
        "parity: gradients in the order of the forward pass",
        "alibi_verify/parity.py",
        "for parameter in reversed(list(gradients))",
        "for parameter in gradients",
        "test_parity.py -k wrong_gradient",
    ),
    Mutant(
        "parity: every second difference of parameters is counted",
        "alibi_verify/parity.py",
        "elements += int(differs.sum())",
        "elements += int(differs.sum()) // 2",
        "test_parity.py -k cause_of_its_own",
    ),
    Mutant(
        "parity: models with other heads are compared",
        "alibi_verify/parity.py",
        '_ARCHITECTURE = ("num_heads", ',
        "_ARCHITECTURE = (",
        "test_parity.py -k cannot_be_compared",
    ),
    Mutant(
        "parity: errors that add up are called a mistake",
        "alibi_verify/explanations.py",
        "if before.max(initial=0.0) <= budget:",
        "if before.max(initial=0.0) < 0:",
        "test_parity.py -k add_up",
    ),
    Mutant(
        "parity: a mistake that explains a little is called the cause",
        "alibi_verify/explanations.py",
        "LIKE = 10.0",
        "LIKE = 1.01",
        "test_parity.py -k only_like",
    ),
    Mutant(
        "parity: layouts of fused tensors are explained the wrong way round",
        "alibi_verify/explanations.py",
        "return stacked.reshape(heads, 3, head_dim, -1).swapaxes(0, 1)",
        "return stacked.reshape(3, heads, head_dim, -1).swapaxes(0, 1)",
        "test_parity.py -k planted",
    ),
    Mutant(
        "parity: factors of products are cut instead of rounded",
        "alibi_verify/explanations.py",
        "np.rint(np.ldexp(significand, bits))",
        "np.trunc(np.ldexp(significand, bits))",
        "test_parity.py -k planted",
    ),
    Mutant(
        "parity: slopes of other head counts are those of the paper",
        "alibi_verify/explanations.py",
        "geometric_slopes(config.num_heads, config.bias_max)",
        "slopes(config.num_heads, config.bias_max)",
        "test_parity.py -k planted",
    ),
    Mutant(
        "parity: padding of a text is read",
        "alibi_cli/commands/parity.py",
        "visible.reshape(shape).astype(np.int64)",
        "np.ones(shape, np.int64)",
        "test_parity.py -k test_text",
    ),
    Mutant(
        "parity: causes of the last hidden states are sought in the embedding",
        "alibi_verify/explanations.py",
        'model.output(_wide(found[f"layers.{model.config.num_layers - 1}"]))',
        "model.output(model.embedding(inputs))",
        "test_parity.py -k explanation_is_found",
    ),
)
