"""In models as other libraries see them."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

FAULTS = (
    Mutant(
        "a mask of the newest keys hides keys of transformers' cache",
        "alibi_torch/transformers.py",
        'inputs | {"key": key, "value": value, "attention_mask": self.mask}',
        'inputs | {"key": key, "value": value, "attention_mask": None}',
        "test_transformers.py -k decoders",
    ),
    Mutant(
        "slopes are interpolated by the newest keys of transformers' cache",
        "alibi_torch/transformers.py",
        "attention_mask, read + seq)",
        "attention_mask, max(read, seq))",
        "test_transformers.py -k in_parts",
    ),
    Mutant(
        "packed documents of transformers see one another",
        "alibi_torch/transformers.py",
        "            segments = _segments(position_ids)",
        "            segments = None",
        "test_transformers.py -k packed",
    ),
    Mutant(
        "positions are segments where there is padding",
        "alibi_torch/transformers.py",
        "elif attention_mask is None and position_ids is not None:",
        "elif position_ids is not None:",
        "test_transformers.py -k packed",
    ),
    Mutant(
        "transformers saves the names of its own module",
        "alibi_torch/transformers.py",
        'name.removeprefix("lm.")',
        "name",
        "test_transformers.py -k saves",
    ),
    Mutant(
        "a folder that lacks tensors is opened with random ones",
        "alibi_torch/transformers.py",
        'if missing := sorted(info["missing_keys"]):',
        "if missing := []:",
        "test_transformers.py -k lack",
    ),
    Mutant(
        "blocks are not computed again when transformers asks for it",
        "alibi_torch/transformers.py",
        "        self.lm.transformer.recompute = value",
        "        self.lm.transformer.recompute = False",
        "test_transformers.py -k losses",
    ),
    Mutant(
        "labels of transformers are counted as if none were left out",
        "alibi_torch/transformers.py",
        "return self.loss_function(logits=logits, labels=labels, **counted)",
        "return self.loss_function(logits=logits, labels=labels.clamp(0), **counted)",
        "test_transformers.py -k losses",
    ),
    Mutant(
        "options that transformers adds are not looked at",
        "alibi_convert/formats/config_file.py",
        "if name not in OF_TRANSFORMERS}",
        "if name in ALiBiConfig.__dataclass_fields__}",
        "test_transformers.py -k lack",
    ),
)
