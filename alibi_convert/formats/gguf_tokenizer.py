"""The tokenizer in a GGUF: byte-level BPE or WordPiece, from tokenizer.json and back.

With BPE, llama.cpp splits a text by one of its own expressions, chosen by name. A tokenizer whose
parts it does not have is refused: its tokens would differ without a sign. The one part left out is
the normalizer NFC of MPT's tokenizer, which llama.cpp never applies; it changes no text in that
form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from alibi_convert.errors import CheckpointError
from alibi_convert.files import parse_json
from alibi_convert.formats import gguf_wordpiece as wordpiece
from alibi_convert.writing.layout import TOKENIZER_FILE

_SETTINGS_FILE, _SPECIAL_FILE = "tokenizer_config.json", "special_tokens_map.json"
_GENERATION_FILE, _TEMPLATE_FILE = "generation_config.json", "chat_template.jinja"
HELD = (TOKENIZER_FILE, _SETTINGS_FILE, _SPECIAL_FILE, _TEMPLATE_FILE)  # companions, in the file

Companion = Callable[[str], bytes | None]  # the contents of one of a source's companions

_MODEL, _KIND = "tokenizer.ggml.model", "gpt2"
_PRE, _CHAT_TEMPLATE = "tokenizer.ggml.pre", "tokenizer.chat_template"
_TOKENS, _TYPES, _MERGES = (f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))
_ADDS = {"bos": "tokenizer.ggml.add_bos_token", "eos": "tokenizer.ggml.add_eos_token"}
_SPECIAL = {
    **{"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"},
    **{"sep": "seperator", "mask": "mask"},
}
_EOS_IF_NONE = 11  # what llama.cpp takes for the end where a file names none: in GPT-2's a comma
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BLOOM = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": r" ?[^(\s|[.,!?…。，、।۔،])]+"},
            "behavior": "Isolated",
            "invert": False,
        },
        {**_BYTE_LEVEL, "use_regex": False},
    ],
}
# The names of llama.cpp's expressions; where two are the same one, a model's own name is written.
_PRE_TOKENIZERS = {"bloom": _BLOOM, "gpt-2": _BYTE_LEVEL, "mpt": _BYTE_LEVEL, "jais": _BYTE_LEVEL}
# With these, it takes the spaces before a mask for a part of it, as Jina's tokenizers do.
_STRIPPING = ("jina-v2-code", "jina-v2-de", "jina-v2-es")
_MASK = "<mask>"
_PRE_TOKENIZERS |= dict.fromkeys(_STRIPPING, _BYTE_LEVEL)
# Options of BPE, and the values under which llama.cpp has the same.
_OPTIONS = {
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}


def _refuse(reason: str) -> NoReturn:
    raise CheckpointError(
        f"{TOKENIZER_FILE} {reason}, which llama.cpp does not have; to write the model without its "
        f"tokenizer, take {TOKENIZER_FILE} out of the folder"
    )


def tokenizer_metadata(companion: Companion, vocab_size: int, architecture: str) -> dict[str, Any]:
    """What a GGUF says of the tokenizer beside a source, which may have none.

    Args:
        companion: reads the source's companions.
        vocab_size: rows of the token embedding; tokens that the tokenizer lacks are marked unused.
        architecture: whose name an expression gets that several have.

    Raises:
        CheckpointError: a companion is broken, or llama.cpp has no such tokenizer.
    """
    contents = companion(TOKENIZER_FILE)
    if contents is None:
        return {_MODEL: "none"}
    values = parse_json(contents, TOKENIZER_FILE)
    try:
        model = values["model"]
        tokens, types = _tokens(values, vocab_size)
        ids = dict(_special_ids(companion, {token: index for index, token in enumerate(tokens)}))
        added = _added(values.get("post_processor"))
        if model["type"] == wordpiece.NAME:
            return _wordpiece_metadata(values, tokens, types, ids, added)
        metadata: dict[str, Any] = {
            _MODEL: _KIND,
            _PRE: _expression(values, architecture),
            _TOKENS: tokens,
            _TYPES: types,
            _MERGES: list(_merges(model)),
        }
        _require_options(values)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{TOKENIZER_FILE} is not a tokenizer: {error!r}") from None
    if "eos" not in ids:
        raise CheckpointError(
            f"no file beside {TOKENIZER_FILE} names a token of it that ends a text; llama.cpp "
            f"would end every text at token {_EOS_IF_NONE}; name one as eos_token in "
            f"{_SETTINGS_FILE}, or take {TOKENIZER_FILE} out of the folder to write the model "
            "without it"
        )
    for name, key in _ADDS.items():
        wanted = added.get(name)
        if wanted is not None and wanted[1] != [ids.get(name)]:
            _refuse(f"adds {wanted[0]!r} to every text without calling it {name}_token")
        metadata[key] = wanted is not None
    metadata |= {_id_key(name): index for name, index in ids.items()}
    template = _chat_template(companion)
    return metadata if template is None else {**metadata, _CHAT_TEMPLATE: template}


def _wordpiece_metadata(
    values: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    ids: Mapping[str, int],
    added: Mapping[str, tuple[str, list[int]]],
) -> dict[str, Any]:
    for token, its_ids in added.values():
        if [tokens[index] for index in its_ids] != [token]:
            _refuse(f"adds {token!r} to every text under other ids, {its_ids}")
    pieces = {
        token: wordpiece.to_piece(token) if kind == _NORMAL else token
        for token, kind in zip(tokens, types, strict=True)
    }
    for reason in wordpiece.reasons(values, added, pieces):
        _refuse(reason)
    names = {"bos": added["bos"][0], "sep": added["eos"][0], "unk": values["model"]["unk_token"]}
    ids = {**ids, **{name: tokens.index(token) for name, token in names.items()}}
    places = {_id_key(name): ids[name] for name in wordpiece.PLACES if name in ids}
    return {_MODEL: wordpiece.KIND, _TOKENS: list(pieces.values()), _TYPES: types, **places}


def _id_key(name: str) -> str:
    return f"tokenizer.ggml.{_SPECIAL[name]}_token_id"


def _tokens(values: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    if values["model"].get("type") not in ("BPE", wordpiece.NAME):
        _refuse(f"is of the kind {values['model'].get('type')}")
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    added = {each["content"]: each for each in values.get("added_tokens") or ()}
    vocab = values["model"]["vocab"]
    places = {**vocab, **{name: each["id"] for name, each in added.items()}}
    for token, index in places.items():
        if not 0 <= index < vocab_size:
            raise CheckpointError(
                f"{TOKENIZER_FILE} has the token {token!r} at {index}, and the model only "
                f"{vocab_size:,} tokens; it is another model's"
            )
        if types[index] != _UNUSED:
            raise CheckpointError(f"{TOKENIZER_FILE} has two tokens at {index}; one must go")
        tokens[index], types[index] = token, _NORMAL
    following = len(vocab)
    for token, each in added.items():
        found = vocab.get(token, following)  # as its library places it
        following = max(following, found + 1)
        if each["id"] != found:
            raise CheckpointError(
                f"{TOKENIZER_FILE} has the token {token!r} at {each['id']}, and its library puts "
                f"it at {found}; save the tokenizer again"
            )
        marked = [name for name in ("lstrip", "rstrip", "single_word") if each.get(name)]
        if marked and not _is_stripping_mask(each):
            _refuse(f"has the token {token!r} with {' and '.join(marked)}")
        types[each["id"]] = _CONTROL if each.get("special") else _USER_DEFINED
    return tokens, types


def _is_stripping_mask(token: Mapping[str, Any]) -> bool:
    marks = [bool(token.get(name)) for name in ("lstrip", "rstrip", "single_word")]
    return token["content"] == _MASK and marks == [True, False, False]


def _merges(model: Mapping[str, Any]) -> Iterator[str]:
    if not model["merges"]:
        _refuse("has no merges")
    for merge in model["merges"]:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2 or any(" " in part for part in parts):
            _refuse(f"has the merge {merge!r}")
        yield " ".join(parts)


def _expression(values: Mapping[str, Any], architecture: str) -> str:
    """The name of the expression that splits a text as the pre-tokenizer does."""
    pre_tokenizer = values.get("pre_tokenizer")
    wanted = _without_defaults(pre_tokenizer)
    strips = any(_is_stripping_mask(each) for each in values.get("added_tokens") or ())
    names = [
        name
        for name, each in _PRE_TOKENIZERS.items()
        if _without_defaults(each) == wanted and (name in _STRIPPING) == strips
    ]
    if not names:
        _refuse(f"has the pre_tokenizer {json.dumps(pre_tokenizer, ensure_ascii=False)}")
    return architecture if architecture in names else names[0]


def _without_defaults(step: Any) -> Any:
    """A pre-tokenizer as it splits: without what only tells where a piece was."""
    if not isinstance(step, Mapping):
        return step
    if step.get("type") == "Sequence":
        steps = [_without_defaults(each) for each in step["pretokenizers"]]
        return steps[0] if len(steps) == 1 else steps
    if step.get("type") == "ByteLevel":
        said = {"add_prefix_space": True, "use_regex": True, **step}
        return {name: said[name] for name in _BYTE_LEVEL}
    return dict(step)


def _require_options(values: Mapping[str, Any]) -> None:
    for name, allowed in _OPTIONS.items():
        if values["model"].get(name) not in allowed:
            _refuse(f"has {name}={values['model'][name]!r}")
    if (values.get("normalizer") or {"type": "NFC"}) != {"type": "NFC"}:
        _refuse(f"has the normalizer {json.dumps(values['normalizer'], ensure_ascii=False)}")


def _added(post_processor: Any) -> dict[str, tuple[str, list[int]]]:
    """The tokens that are put before and after every text, with their ids."""
    steps = [post_processor] if post_processor else []
    if steps and steps[0]["type"] == "Sequence":
        steps = steps[0]["processors"]
    steps = [each for each in steps if each["type"] != "ByteLevel"]
    if not steps:
        return {}
    if len(steps) == 1 and steps[0]["type"] in ("BertProcessing", "RobertaProcessing"):
        return {
            name: (token, [index])
            for name, (token, index) in (("bos", steps[0]["cls"]), ("eos", steps[0]["sep"]))
        }
    if len(steps) > 1 or steps[0]["type"] != "TemplateProcessing":
        _refuse(f"has the post_processor {json.dumps(post_processor, ensure_ascii=False)}")
    kinds = [next(iter(piece)) for piece in steps[0]["single"]]
    names = [piece.get("SpecialToken", {}).get("id", "") for piece in steps[0]["single"]]
    at = kinds.index("Sequence")
    if at > 1 or len(kinds) - at > 2:
        _refuse("puts several tokens before or after every text")
    sides = {"bos": names[:at], "eos": names[at + 1 :]}
    special = steps[0]["special_tokens"]
    return {name: (found[0], special[found[0]]["ids"]) for name, found in sides.items() if found}


def _special_ids(companion: Companion, places: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    files = (_SETTINGS_FILE, _SPECIAL_FILE, _GENERATION_FILE)
    read = {name: parse_json(companion(name) or b"{}", name) for name in files}
    for name in _SPECIAL:
        said = [read[file].get(f"{name}_token") for file in (_SETTINGS_FILE, _SPECIAL_FILE)]
        tokens = [str(each.get("content") if isinstance(each, dict) else each) for each in said]
        found = next((places[token] for token in tokens if token in places), None)
        index = read[_GENERATION_FILE].get(f"{name}_token_id") if found is None else found
        if isinstance(index, int) and 0 <= index < len(places):
            yield name, index


def _chat_template(companion: Companion) -> str | None:
    template = companion(_TEMPLATE_FILE)
    if template is not None:
        try:
            return template.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{_TEMPLATE_FILE} is not UTF-8: {error}") from None
    said = parse_json(companion(_SETTINGS_FILE) or b"{}", _SETTINGS_FILE).get("chat_template")
    return said if isinstance(said, str) else None


def why_not_rebuilt(metadata: Mapping[str, Any]) -> str | None:
    """Why the tokenizer of a file cannot be made a tokenizer.json, or None."""
    kind, pre = metadata.get(_MODEL), metadata.get(_PRE)
    if kind == wordpiece.KIND:
        return None
    if kind != _KIND:
        return f"a tokenizer of the kind {kind!r}; only byte-level BPE and WordPiece are rebuilt"
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        return f"a tokenizer that splits by {pre!r}; known: {', '.join(_PRE_TOKENIZERS)}"
    return None


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether a file holds one."""
    return metadata.get(_MODEL) not in (None, "none", "no_vocab")


def companions(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that a folder keeps of the tokenizer in a GGUF, by name; empty where it has none.

    Raises:
        CheckpointError: the lists of the tokenizer contradict one another.
    """
    if why_not_rebuilt(metadata) is not None:
        return {}
    is_wordpiece = metadata[_MODEL] == wordpiece.KIND
    added = [name for name, key in _ADDS.items() if metadata.get(key)]
    places = {name: metadata.get(_id_key(name)) for name in _SPECIAL}
    if is_wordpiece:
        added = ["bos", "sep"]
        places = {name: metadata.get(_id_key(name), at) for name, at in wordpiece.PLACES.items()}
    for name, kind in ((_TOKENS, str), (_TYPES, int), (_MERGES, str)):
        values = metadata.get(name, [])
        if not isinstance(values, list) or not all(isinstance(each, kind) for each in values):
            raise CheckpointError(f"{name} is no list of {kind.__name__}; the file is damaged")
    tokens = metadata.get(_TOKENS, [])
    types = metadata.get(_TYPES) or [_NORMAL] * len(tokens)
    if is_wordpiece and len(types) == len(tokens):
        kinded = zip(tokens, types, strict=True)
        tokens = [wordpiece.from_piece(each) if kind == _NORMAL else each for each, kind in kinded]
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise CheckpointError(
            f"the tokenizer has {len(tokens):,} tokens, {len(set(tokens)):,} of them different, "
            f"and {len(types):,} types; the file is damaged"
        )
    kinds = dict(zip(tokens, types, strict=True))
    special = {
        name: tokens[index]
        for name, index in places.items()
        if isinstance(index, int)
        and 0 <= index < len(tokens)
        # One that the file names may be without a spelling, as one for padding often is.
        and (_id_key(name) in metadata or types[index] != _UNUSED)
    }
    kinds |= {token: _CONTROL for token in special.values() if kinds[token] == _UNUSED}
    vocab = {token: at for at, token in enumerate(tokens) if kinds[token] != _UNUSED}
    if is_wordpiece and not {"bos", "sep", "unk"} <= special.keys():
        raise CheckpointError(
            "the tokenizer lacks the token before a text, behind it or for unknown words; the file "
            "is damaged"
        )
    around = {name: special[name] for name in added if name in special}
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                **{"id": at, "content": token, "single_word": False},
                "lstrip": token == _MASK and metadata.get(_PRE) in _STRIPPING,
                **{"rstrip": False, "normalized": False, "special": kinds[token] != _USER_DEFINED},
            }
            for token, at in vocab.items()
            if kinds[token] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "post_processor": _post_processor(around, vocab),
        **(wordpiece.parts(vocab, special["unk"]) if is_wordpiece else _bpe(metadata, vocab)),
    }
    settings = {f"{name}_token": token for name, token in special.items()}
    if is_wordpiece:
        settings["cls_token"] = settings.pop("bos_token")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    if _CHAT_TEMPLATE in metadata:
        settings["chat_template"] = metadata[_CHAT_TEMPLATE]
    files = {TOKENIZER_FILE: values, _SETTINGS_FILE: settings}
    if special and not is_wordpiece:
        ids = {f"{name}_token_id": vocab[token] for name, token in special.items()}
        files[_GENERATION_FILE] = ids
    return {name: json.dumps(each, ensure_ascii=False).encode() for name, each in files.items()}


def _bpe(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> dict[str, Any]:
    return {
        "normalizer": None,
        "pre_tokenizer": _with_offsets(_PRE_TOKENIZERS[metadata[_PRE]]),
        "decoder": {**_BYTE_LEVEL, "trim_offsets": True},
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": None},
            **{"continuing_subword_prefix": None, "end_of_word_suffix": None},
            **{"fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
            **{"vocab": vocab, "merges": [each.split(" ") for each in metadata.get(_MERGES, [])]},
        },
    }


def _with_offsets(step: Mapping[str, Any]) -> dict[str, Any]:
    """A pre-tokenizer with the option that its library asks for."""
    if step["type"] == "Sequence":
        return {**step, "pretokenizers": [_with_offsets(each) for each in step["pretokenizers"]]}
    return {**step, "trim_offsets": True} if step["type"] == "ByteLevel" else dict(step)


def _post_processor(around: Mapping[str, str], vocab: Mapping[str, int]) -> dict[str, Any] | None:
    """The tokens before ("bos") and after every text."""
    if not around:
        return None
    text: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    pieces = {name: {"SpecialToken": {"id": token, "type_id": 0}} for name, token in around.items()}
    first = [pieces.pop("bos")] if "bos" in pieces else []
    return {
        "type": "TemplateProcessing",
        "single": [*first, text, *pieces.values()],
        "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")],
        "special_tokens": {
            token: {"id": token, "ids": [vocab[token]], "tokens": [token]}
            for token in around.values()
        },
    }
