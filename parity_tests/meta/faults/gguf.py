"""Plausible mistakes in the files of llama.cpp."""

from __future__ import annotations

from parity_tests.meta.mutant import Mutant

_FAMILIES, _FILE = "alibi_convert/families/gguf.py", "alibi_convert/formats/gguf_file.py"
_TOKENIZER = "alibi_convert/formats/gguf_tokenizer.py"

FAULTS = (
    Mutant(
        "GGUF: queries for keys",
        _FAMILIES,
        "attn.{{query,key,value}}",
        "attn.{{key,query,value}}",
        "test_gguf.py -k tensors",
    ),
    Mutant(
        "GGUF: vectors in the dtype of the matrices",
        "alibi_convert/formats/gguf.py",
        'DTYPES["float32"] if len(header.shape) == 1 else asked or header.dtype',
        "asked or header.dtype",
        "test_gguf.py -k tensors",
    ),
    Mutant(
        "GGUF: axes in the file's order",
        _FILE,
        'cursor.numbers("Q", axes)[::-1]',
        'cursor.numbers("Q", axes)',
        "test_gguf.py -k tensors",
    ),
    Mutant(
        "GGUF: heads of keys and values left out",
        _FAMILIES,
        '{"num_kv_heads": "kv_heads", ',
        "{",
        "test_gguf.py -k metadata_says",
    ),
    Mutant(
        "GGUF: tensors that are not aligned",
        _FILE,
        "            writer.write_padding(file, file.tell())\n            for chunk",
        "            for chunk",
        "test_gguf.py -k tensors",
    ),
    Mutant(
        "GGUF: tensors read from where the header ends",
        _FILE,
        "start = file.tell() + -file.tell() % alignment",
        "start = file.tell()",
        "test_gguf.py -k tensors",
    ),
    Mutant(
        "GGUF: an end beyond the file",
        _FILE,
        "if end > size:",
        "if end > 2 * size:",
        "test_gguf.py -k headers",
    ),
    Mutant(
        "GGUF: a name read twice",
        _FILE,
        "if name in found:",
        "if not name:",
        "test_gguf.py -k headers",
    ),
    Mutant(
        "GGUF: counts believed",
        _FILE,
        "if found * least > self.left:",
        "if found < 0:",
        "test_gguf.py -k headers",
    ),
    Mutant(
        "GGUF: one part for the whole model",
        _FILE,
        "if parts not in (0, 1):",
        "if parts == 0:",
        "test_gguf.py -k several_files",
    ),
    Mutant(
        "GGUF: epsilon as float32 rounds it",
        _FAMILIES,
        "return float(str(np.float32(value)))",
        "return float(np.float32(value))",
        "test_gguf.py -k tensors",
    ),
    Mutant(
        "GGUF: JAIS divides by the root",
        _FAMILIES,
        "1 / ALiBiConfig(**fields).head_dim",
        "None",
        "test_gguf.py -k 'tensors and jais'",
    ),
    Mutant(
        "GGUF: a Baichuan that llama.cpp gives no positions",
        _FAMILIES,
        'fields["num_layers"] != _BAICHUAN_13B_LAYERS',
        'fields["num_layers"] > _BAICHUAN_13B_LAYERS',
        "test_gguf.py -k cannot_express",
    ),
    Mutant(
        "GGUF: a field that cannot be said is left out",
        _FAMILIES,
        "if value != getattr(found, name):",
        "if value is None:",
        "test_gguf.py -k cannot_express",
    ),
    Mutant(
        "GGUF: mixed dtypes opened as they are",
        "alibi_convert/checkpoint.py",
        "if len(dtypes) == 1:",
        "if dtypes:",
        "test_gguf.py -k several_dtypes",
    ),
    Mutant(
        "GGUF: user-defined tokens as control tokens",
        _TOKENIZER,
        '_CONTROL if each.get("special") else _USER_DEFINED',
        "_CONTROL",
        "test_gguf.py -k metadata_says",
    ),
    Mutant(
        "GGUF: a normalizer passed over",
        _TOKENIZER,
        'if (values.get("normalizer") or {"type": "NFC"}) != {"type": "NFC"}:',
        'if values.get("normalizer") == {"type": "NFC"}:',
        "test_gguf.py -k does_not_have",
    ),
    Mutant(
        "GGUF: a token that strips spaces",
        _TOKENIZER,
        "if marked:",
        "if not token:",
        "test_gguf.py -k does_not_have",
    ),
    Mutant(
        "GGUF: the tokenizer lost when a model is saved",
        "alibi_convert/writing/origin.py",
        "in origin.inside().items():",
        "in {}.items():",
        "test_gguf.py -k come_back",
    ),
    Mutant(
        "GGUF: files that were joined refused",
        _FILE,
        "if parts not in (0, 1):",
        "if parts != 1:",
        "test_gguf.py -k joined",
    ),
    Mutant(
        "GGUF: a special token without a spelling left out",
        _TOKENIZER,
        "for token in special.values() if",
        "for token in () if",
        "test_gguf.py -k without_a_spelling",
    ),
    Mutant(
        "GGUF: a folder made of one, not run by its library",
        "alibi_verify/logits.py",
        "return why_no_peer(source) is not None and why_no_peer(result) is None",
        "return False",
        "test_gguf.py -k run_by_its_library",
    ),
    Mutant(
        "GGUF: a tokenizer that a plan does not look at",
        "alibi_convert/formats/gguf.py",
        "    check=_tokenizer,\n",
        "",
        "test_gguf.py -k does_not_have",
    ),
    Mutant(
        "GGUF: a tokenizer that is lost without a word",
        "alibi_convert/writing/provenance.py",
        "[] if held else [*inside]",
        "[]",
        "test_gguf.py -k come_back",
    ),
)
