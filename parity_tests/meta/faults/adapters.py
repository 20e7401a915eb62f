"""Plausible mistakes in merging adapters."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

FAULTS = (
    Mutant(
        "an adapter's scaling without its alpha",
        "alibi_convert/adapters/settings.py",
        "return alpha / (math",
        "return self.alpha * 0 + 1 / (math",
        "test_adapters.py -k merged_tensors",
    ),
    Mutant(
        "rank-stabilized adapters are scaled like others",
        "alibi_convert/adapters/settings.py",
        "math.sqrt(rank) if self.is_rank_stabilized else rank",
        "rank",
        "test_adapters.py -k merged_tensors",
    ),
    Mutant(
        "the pattern of an alpha may stand anywhere in a name",
        "alibi_convert/adapters/settings.py",
        'if re.match(rf"(.*\\.)?({each})$", module)',
        "if re.search(each, module)",
        "test_adapters.py -k merged_tensors",
    ),
    Mutant(
        "what peft may switch on besides is not looked at",
        "alibi_convert/adapters/settings.py",
        "    reader.require_rest_off()\n",
        "",
        "test_adapters.py -k settings",
    ),
    Mutant(
        "any initialisation leaves the base as it was",
        "alibi_convert/adapters/settings.py",
        "if initial not in _INITIAL_VALUES:",
        "if initial is None:",
        "test_adapters.py -k settings",
    ),
    Mutant(
        "a stranger's regular expression may repeat groups",
        "alibi_convert/adapters/settings.py",
        " or _REPEATED_GROUP.search(pattern)",
        "",
        "test_adapters.py -k settings",
    ),
    Mutant(
        "an adapter's A and B are exchanged",
        "alibi_convert/adapters/folder.py",
        "first, second = (factors[name] for name in names)",
        "second, first = (factors[name] for name in names)",
        "test_adapters.py -k merged_tensors",
    ),
    Mutant(
        "an adapter's factors are multiplied in float32",
        "alibi_convert/adapters/merging.py",
        "factor.astype(np.float64) for factor",
        "factor.astype(np.float32) for factor",
        "test_adapters.py -k one_rounding",
    ),
    Mutant(
        "an adapter's product is rounded before it is added",
        "alibi_convert/adapters/merging.py",
        "        total *= scaling\n",
        "        total = (total * scaling).astype(weight.dtype).astype(np.float64)\n",
        "test_adapters.py -k one_rounding",
    ),
    Mutant(
        "a layer that is stored transposed gets its product as it is",
        "alibi_convert/adapters/merging.py",
        "update.is_embedding or name in transposed",
        "update.is_embedding or (name in transposed and 'c_proj' not in name)",
        "test_adapters.py -k transposed",
    ),
    Mutant(
        "an adapter that lacks a layer is merged",
        "alibi_convert/adapters/merging.py",
        "    _require_complete(adapter, tensors)\n",
        "",
        "test_adapters.py -k tensors_that_are_refused",
    ),
    Mutant(
        "a tensor of an adapter that has no place is passed over",
        "alibi_convert/adapters/merging.py",
        "in replaced.items():\n        tensors.replace(name, header)",
        "in replaced.items():\n        if name in tensors.headers:\n"
        "            tensors.replace(name, header)",
        "test_adapters.py -k tensors_that_are_refused",
    ),
    Mutant(
        "a tied head follows the embedding that an adapter changed",
        "alibi_convert/adapters/merging.py",
        "            untied = second\n",
        "            headers.pop(second)\n",
        "test_adapters.py -k merged_tensors",
    ),
    Mutant(
        "a tied base layer in an adapter's file replaces one of its names",
        "alibi_convert/adapters/merging.py",
        "{name, *(tensors.other_names(name) - below.keys())}",
        "{name}",
        "test_adapters.py -k merged_tensors",
    ),
    Mutant(
        "a killed run goes on with another adapter",
        "alibi_convert/checkpoint.py",
        "files={**opened.files, **({} if found is None else found.files)}",
        "files=opened.files",
        "test_adapters.py -k resumes",
    ),
    Mutant(
        "a conversion is checked against its base without the adapter",
        "alibi_verify/logits.py",
        '"adapter": adapter}',
        '"adapter": None}',
        "test_adapters.py -k what_it_merged",
    ),
    Mutant(
        "transformers is run without the adapter",
        "alibi_verify/peers.py",
        "    if checkpoint.merged is not None:\n",
        "    if False:\n",
        "test_adapters.py -k what_it_merged",
    ),
)
