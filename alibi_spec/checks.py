"""Errors of both backends for bad arguments: one message per mistake, from shapes and flags."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alibi_spec.biases import DISTANCES

if TYPE_CHECKING:
    from alibi_spec.config import ALiBiConfig
    from alibi_spec.training import Recipe


class RefusalError(ValueError):
    """An implementation of attention that cannot compute a call, with the reason."""

    def __init__(self, implementation: str, reason: str, able: Sequence[str]) -> None:
        super().__init__(
            f"implementation={implementation!r} cannot compute this: {reason}; "
            f"expected one of {('auto', *able)}"
        )
        self.reason = reason


def require_vocabulary(vocab_size: int | None) -> int:
    """`vocab_size`, or ValueError when an `ALiBiLM` is built without one."""
    if vocab_size is None:
        raise ValueError("ALiBiLM needs vocab_size; pass it to ALiBiConfig, e.g. vocab_size=256")
    return vocab_size


def forbid_vocabulary(vocab_size: int | None) -> None:
    """Raise ValueError when an `ALiBiTransformer` is built with a vocabulary."""
    if vocab_size is not None:
        raise ValueError(
            f"vocab_size={vocab_size} describes an ALiBiLM; use ALiBiLM, or vocab_size=None for a "
            "bare ALiBiTransformer"
        )


def check_array(name: str, value: object, kinds: tuple[type, ...], expected: str) -> None:
    """Raise ValueError unless `value` is an array of the backend."""
    if not isinstance(value, kinds):
        raise ValueError(f"{name} is a {type(value).__name__}; expected {expected}")


def check_embeddings(shape: Sequence[int], is_floating: bool, d_model: int) -> None:
    """Raise ValueError unless embeddings are floating [batch, seq, d_model]."""
    if len(shape) != 3 or shape[-1] != d_model or shape[1] == 0:
        raise ValueError(
            f"embeddings have shape {list(shape)}; expected [batch, seq, d_model={d_model}] "
            "with at least one position"
        )
    if not is_floating:
        raise ValueError("embeddings are not floating point; pass tokens to ALiBiLM instead")


def check_tokens(shape: Sequence[int], is_integer: bool) -> None:
    """Raise ValueError unless tokens are integers [batch, seq]."""
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(
            f"tokens have shape {list(shape)}; expected [batch, seq] with at least one position"
            + ("; add a batch axis with tokens[None]" if len(shape) == 1 else "")
        )
    if not is_integer:
        raise ValueError(
            "tokens are not integers; pass token ids, or embeddings to ALiBiTransformer"
        )


def check_token_range(lowest: int, highest: int, vocab_size: int, what: str = "token") -> None:
    """Raise ValueError unless every token (or token type) is inside its vocabulary."""
    if lowest < 0 or highest >= vocab_size:
        outside = lowest if lowest < 0 else highest
        raise ValueError(
            f"{what} {outside} is outside the vocabulary; expected 0 … {vocab_size - 1}"
        )


def check_mask(name: str, shape: Sequence[int], is_integer: bool, batch: int, key_len: int) -> None:
    """Raise ValueError unless a mask (or segment ids) is integer or boolean [batch, seq]."""
    if list(shape) != [batch, key_len]:
        raise ValueError(
            f"{name} has shape {list(shape)}; expected [batch={batch}, seq={key_len}], "
            "one entry per key"
        )
    if not is_integer:
        raise ValueError(f"{name} is floating point; expected booleans or integers (0 is padding)")


def check_segments(config: ALiBiConfig, seq: int, has_cache: bool) -> None:
    """Raise ValueError unless every segment is computed as if it were alone (SPEC.md §4.3)."""
    limit = config.slope_interpolation
    if has_cache:
        raise ValueError(
            "segment_ids and a cache do not go together: a cache holds one document in each row; "
            "pass one of them"
        )
    if config.distance == "bfloat16":
        raise ValueError(
            'a model with distance="bfloat16" counts its keys from the first one of a row, so that '
            "a document depends on those before it; give each a row of its own"
        )
    if limit is not None and seq > limit:
        raise ValueError(
            f"rows of {seq} positions are longer than slope_interpolation={limit}, so that slopes "
            f"depend on the row and not on the document; pack rows of at most {limit} positions"
        )


def check_token_types(type_vocab_size: int | None, is_given: bool) -> None:
    """Raise ValueError when a model without embeddings of token types gets token types."""
    if is_given and type_vocab_size is None:
        raise ValueError("token_type_ids need a model with type_vocab_size; this one has none")


def check_attention(
    query_shape: Sequence[int],
    key_shape: Sequence[int],
    value_shape: Sequence[int] | None,
    slopes_shape: Sequence[int],
    dtypes: Sequence[str],
    distance: str,
    scale: float | None,
) -> None:
    """Raise ValueError unless the arrays of one attention call fit one another.

    Shapes are [batch, heads, seq, head_dim]; `dtypes` are those of query, key (and value).
    """
    if len(set(dtypes)) > 1 or "float" not in dtypes[0]:
        raise ValueError(
            f"query, key and value have dtypes {', '.join(dtypes)}; expected one floating dtype"
        )
    for name, shape in (("query", query_shape), ("key", key_shape), ("value", value_shape)):
        if shape is not None and len(shape) != 4:
            raise ValueError(f"{name} has {len(shape)} axes; expected 4")
    batch, heads, query_len, head_dim = query_shape
    if [heads] != list(slopes_shape) == [query_len]:
        raise ValueError(
            f"query has {heads} heads and {query_len} positions, and there are {query_len} slopes; "
            "it seems to be in the other backend's layout: torch takes "
            "[batch, heads, seq, head_dim] and Flax [batch, seq, heads, head_dim]"
        )
    _, kv_heads, key_len, _ = key_shape
    if list(key_shape) != [batch, kv_heads, key_len, head_dim] or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"key does not fit query: query has batch={batch}, heads={heads}, head_dim={head_dim}; "
            f"key has batch={key_shape[0]}, heads={kv_heads} (expected a divisor of {heads}), "
            f"head_dim={key_shape[3]}"
        )
    if value_shape is not None and list(value_shape[:3]) != list(key_shape[:3]):
        raise ValueError(
            f"value does not fit key: key has batch={batch}, heads={kv_heads}, length={key_len}; "
            f"value has batch={value_shape[0]}, heads={value_shape[1]}, length={value_shape[2]}"
        )
    if query_len > key_len:
        raise ValueError(
            f"query length {query_len} exceeds key length {key_len}; the last query stands at the "
            "last key, so there can be no more queries than keys"
        )
    if list(slopes_shape) != [heads]:
        raise ValueError(f"slopes have shape {list(slopes_shape)}; expected [heads={heads}]")
    if distance not in DISTANCES:
        raise ValueError(f"distance={distance!r} is not valid; expected one of {DISTANCES}")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale!r} is not valid; expected None or a number above 0")


def check_devices(devices: Mapping[str, str]) -> None:
    """Raise ValueError unless all arrays of one attention call, by name, are on one device."""
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"the arrays of a call are on several devices: {places}; move all to one")


def check_slopes(are_finite: bool) -> None:
    """Raise ValueError unless the slopes are finite."""
    if not are_finite:
        raise ValueError("slopes hold a number that is not finite; expected finite slopes")


def check_attention_options(
    tolerance: str | float, dropout: float, implementation: str, implementations: Sequence[str]
) -> None:
    """Raise ValueError unless the options of one attention call are known."""
    check_implementation(implementation, implementations)
    if tolerance != "dtype" and not (isinstance(tolerance, int | float) and 0 <= tolerance < 1):
        raise ValueError(
            f"tolerance={tolerance!r} is not valid; expected 'dtype' or a share in [0, 1)"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} is not valid; expected a rate in [0, 1)")


def check_implementation(implementation: str, implementations: Sequence[str]) -> None:
    """Raise ValueError unless an implementation of attention is "auto" or one of these."""
    if implementation not in ("auto", *implementations):
        raise ValueError(
            f"implementation={implementation!r} is not known; expected one of "
            f"{('auto', *implementations)}"
        )


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raise ValueError unless an option is an integer of at least `least`, at most `most`."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not (is_integer and least <= value <= (value if most is None else most)):
        expected = f"of at least {least}" if most is None else f"in {least} … {most}"
        raise ValueError(f"{name}={value!r} is not valid; expected an integer {expected}")


def beyond_windows(distance: str, causal: bool) -> str | None:
    """Why a kernel over windows, which computes only -m |i - j| (SPEC.md §9), refuses this bias.

    The rest of a sentence that begins with the kernel; None if it computes the bias.
    """
    if distance == "bfloat16":
        return "it has no rounded bias (distance='bfloat16')"
    if distance == "signed" and not causal:
        return "it has no bias that rewards later keys (distance='signed' with causal=False)"
    return None


def without_derivative(which: str) -> str:
    """The error for a derivative that kernels over windows do not have."""
    return f"attention over windows has no {which} derivative; use implementation='dense'"


def warning_of_dense_dropout(distance: str, causal: bool) -> str:
    """The warning for a long call with dropout that only dense attention can compute."""
    return (
        "dense attention computes this call with dropout: time and memory grow with queries times "
        f"keys. No kernel over windows can: {beyond_windows(distance, causal)}. With "
        "distance='absolute' both grow linearly; without dropout they are smaller"
    )


def check_plannable(distance: str, causal: bool) -> None:
    """Raise ValueError unless attention with this bias has a plan."""
    reason = beyond_windows(distance, causal)
    if reason is not None:
        raise ValueError(f"this model has no plan, because no kernel over windows fits: {reason}")


def check_cache(config: ALiBiConfig, batch_size: int, batch: int) -> None:
    """Raise ValueError unless the model is causal and cache and inputs have one batch size."""
    if not config.causal:
        raise ValueError("an encoder (causal=False) has no cache: its keys depend on later tokens")
    if batch_size != batch:
        raise ValueError(
            f"the cache holds {batch_size} sequences and the inputs have {batch}; make one with "
            f"KVCache.empty(config, {batch}, …)"
        )


def check_capacity(length: int, new_len: int, capacity: int) -> None:
    """Raise ValueError unless `new_len` more positions fit into a cache."""
    if length + new_len > capacity:
        raise ValueError(
            f"the cache has room for {capacity} positions and holds {length}; {new_len} more do "
            f"not fit; make one with KVCache.empty(config, batch_size, {length + new_len} or more)"
        )


def check_windows(shape: tuple[int, ...], has_bounded: bool, config: ALiBiConfig) -> None:
    """Raise ValueError unless this model can have such windows."""
    if not config.causal:
        raise ValueError("windows are those of a decoder; pass windows=None for an encoder")
    expected = (config.num_layers, config.num_heads)
    if shape != expected:
        raise ValueError(f"windows have shape {shape}; expected {expected}, layers and heads")
    if has_bounded and config.distance == "bfloat16":
        raise ValueError(
            'a model with distance="bfloat16" counts its keys from the first one, so a cache must '
            "keep all; pass windows=None"
        )


def check_bounded(capacity: int | None, has_unbounded: bool) -> None:
    """Raise ValueError where nothing bounds a cache."""
    if capacity is None and has_unbounded:
        raise ValueError(
            "capacity=None needs windows that bound every head; pass a number of positions, or "
            "the result of model_windows, if it holds no -1"
        )


def check_cache_dtype(cached: str, computed: str) -> None:
    """Raise ValueError unless keys and values have the dtype of their cache."""
    if cached != computed:
        raise ValueError(
            f"the cache holds {cached} and the model computes {computed} now; make another cache "
            "for this dtype"
        )


USED_CACHE = (
    "this cache was already used: its memory belongs to the cache that the call returned; pass "
    "that one"
)
UNPROVED = (
    "the cache no longer holds every key that this input needs: its logits are larger than the "
    "windows allow; read it with wider windows, or with windows=None"
)
OTHER_CACHE = "this cache belongs to a model with another configuration; make one with this model's"


def check_generation(causal: bool, head: str, max_new_tokens: int) -> None:
    """Raise ValueError unless a model of this kind can generate `max_new_tokens` tokens."""
    if not causal:
        raise ValueError("an encoder (causal=False) cannot generate; use a causal model")
    if head != "linear":
        raise ValueError(f"a model with head={head!r} cannot generate; it predicts no next token")
    check_count("max_new_tokens", max_new_tokens, least=0)


def check_scoring(causal: bool, head: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless a model of this kind predicts tokens of these."""
    if not causal:
        raise ValueError("an encoder (causal=False) predicts no next token; use a causal model")
    if head != "linear":
        raise ValueError(f"a model with head={head!r} predicts no next token")
    if len(shape) == 2 and shape[1] < 2:
        raise ValueError(f"tokens have shape {list(shape)}; expected at least two in a sequence")


def check_recipe(config: ALiBiConfig, recipe: Recipe, dtypes: Collection[str]) -> None:
    """Raise ValueError unless a model with weights of these dtypes can be trained like this."""
    check_predicts(config.head)
    if recipe.objective == "next_token" and not (config.causal and config.head == "linear"):
        raise ValueError(
            "objective='next_token' needs a decoder (causal=True) with head='linear'; this model "
            f"has causal={config.causal} and head={config.head!r}; use objective='masked_lm'"
        )
    if recipe.objective == "masked_lm" and config.causal and config.head == "linear":
        raise ValueError(
            "objective='masked_lm' needs an encoder (causal=False) or head='masked_lm'; this model "
            "is a decoder; use objective='next_token'"
        )
    narrow = set(dtypes) - {"float32", "float64"}
    if narrow:
        raise ValueError(
            f"weights are {', '.join(sorted(narrow))}; expected float32 or float64, which small "
            "steps do not vanish in; what a step computes in is the recipe's compute_dtype"
        )


def check_predicts(head: str) -> None:
    """Raise ValueError when a model without logits is asked for a loss."""
    if head == "none":
        raise ValueError("a model with head='none' predicts no tokens, and so has no loss")


def check_batch(shapes: Mapping[str, Sequence[int]], batch_size: int | None = None) -> None:
    """Raise ValueError unless these are the arrays of a batch (of so many sequences)."""
    for name in ("tokens", "targets"):
        if name not in shapes:
            raise ValueError(f"the batch has no {name}; it has {', '.join(shapes)}")
    for name in shapes:
        if name not in ("tokens", "targets", *BATCH_OPTIONS):
            expected = ", ".join(BATCH_OPTIONS)
            raise ValueError(
                f"{name!r} is no array of a batch; expected tokens, targets and perhaps {expected}"
            )
        if list(shapes[name]) != list(shapes["tokens"]):
            raise ValueError(
                f"{name} has shape {list(shapes[name])} and tokens {list(shapes['tokens'])}; "
                "expected one entry per token"
            )
    rows = shapes["tokens"][0]
    if batch_size is not None and rows != batch_size:
        raise ValueError(
            f"the batch has {rows} sequences and the recipe batch_size={batch_size}; pass all "
            "sequences of a step, which accumulation_steps divides"
        )


BATCH_OPTIONS = ("segment_ids", "attention_mask", "token_type_ids")


def check_counted(count: int) -> None:
    """Raise ValueError for a batch without a target."""
    if count == 0:
        raise ValueError(
            "no position of the batch has a target: all are ignored (-100), so there is no loss; "
            "leave the batch out"
        )


def check_filling(causal: bool, head: str, vocab_size: int, mask_token_id: int, top_k: int) -> None:
    """Raise ValueError unless a model of this kind fills this mask with this many tokens."""
    if head == "none":
        raise ValueError(
            "a model with head='none' predicts no tokens; use one with its masked-language head"
        )
    if causal and head == "linear":
        raise ValueError(
            "a decoder (causal=True) predicts the next token and fills no mask; use a masked "
            "language model"
        )
    check_token_range(mask_token_id, mask_token_id, vocab_size, "mask_token_id")
    check_count("top_k", top_k, most=vocab_size)


def check_prompts(lengths: Sequence[int]) -> None:
    """Raise ValueError unless every prompt has a token that is not padding."""
    for row, length in enumerate(lengths):
        if length == 0:
            raise ValueError(
                f"prompt {row} is only padding; expected at least one token in every prompt"
            )
