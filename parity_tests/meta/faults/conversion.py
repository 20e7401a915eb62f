"""Plausible mistakes in converting checkpoints and verifying them."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

FAULTS = (
    Mutant(
        "query, key, value instead of key, query, value",
        "alibi_convert/families/jaketae.py",
        "attn.{key,query,value}.weight",
        "attn.{query,key,value}.weight",
        "test_seed.py",
    ),
    Mutant(
        "strided arrays written as they are",
        "alibi_convert/tensors.py",
        "contiguous_chunks(part, nbytes)",
        "contiguous_chunks(part.T, nbytes)",
        "test_safetensors.py -k awkward",
    ),
    Mutant(
        "the hub's main branch instead of the revision",
        "alibi_convert/hub.py",
        "name, revision=revision, allow",
        "name, revision=None, allow",
        "test_hub.py -k 'fetched or revisions'",
    ),
    Mutant(
        "float64 is rounded to bfloat16 by way of float32",
        "alibi_convert/values.py",
        "chunk = _rounded_to_odd(chunk)",
        "chunk = chunk.astype(np.float32)",
        "test_convert.py -k round_once",
    ),
    Mutant(
        "memory that the process is not allowed counts as available",
        "alibi_convert/machine.py",
        ', (resource.RLIMIT_DATA, "VmData")):',
        ",):",
        "test_plan.py -k may_still_take",
    ),
    Mutant(
        "verification that never reads back",
        "alibi_convert/conversion.py",
        "require_same(wanted, written, advance)",
        "require_same(wanted, wanted, advance)",
        "test_destinations.py -k wrong_write",
    ),
    Mutant(
        "verify runs the same checkpoint twice",
        "alibi_verify/verification.py",
        "_activations(FlaxBackend(), theirs, ",
        "_activations(FlaxBackend(), ours, ",
        "test_convert.py -k sees_a_model",
    ),
    Mutant(
        "a cast proven by its dtypes alone",
        "alibi_convert/comparison.py",
        "onward = first_difference(_cast_like(first, second), second)",
        "onward = None",
        "test_convert.py -k knows_a_cast",
    ),
    Mutant(
        "of flattened params that are there twice the last one counts",
        "alibi_convert/rules.py",
        "if apart in leaves:",
        "if apart == ():",
        "test_rules.py -k flattened",
    ),
    Mutant(
        "a tokenizer that cuts long texts in silence",
        "alibi_convert/tokenizer.py",
        "tokenizer.no_truncation()",
        "tokenizer.get_vocab_size()",
        "test_hub.py -k tokenizers",
    ),
)
