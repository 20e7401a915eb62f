"""What an implementation offers the kit: functions of NumPy arrays, as many of them as it has.

The kit runs the levels whose functions are there and names the others (`levels.py`). A function
raises NotImplementedError, with the reason, for a configuration that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool, Float, Integer, Num

    _Mask = Integer[np.ndarray, "batch key_len"] | None
    _Parameters = Mapping[str, Float[np.ndarray, "..."]]
    _Arrays = Mapping[str, Num[np.ndarray, "..."]]

Config = Mapping[str, Any]  # every option of an `ALiBiConfig`, as in JSON (SPEC.md §1)
Recipe = Mapping[str, Any]  # every option of a `Recipe`, as in JSON (SPEC.md §18)


class Implementation(Protocol):
    """All functions; the kit calls them by these names of arguments, and leaves None out.

    Parameters have the names, shapes and layouts of `parameter_table`: those of torch. Arrays come
    as float32 and int64, and go back in any float dtype of NumPy.

    Attributes:
        name: in reports.
        dtype: "float32" (also for wider ones), "bfloat16" or "float16": what it computes in.
        device: "cpu", "gpu" or "tpu". Both choose a row of `alibi_spec.budgets`.
    """

    name: str
    dtype: str
    device: str

    def biased_logits(
        self,
        config: Config,
        query: Float[np.ndarray, "batch heads query_len head_dim"],
        key: Float[np.ndarray, "batch kv_heads key_len head_dim"],
        slopes: Float[np.ndarray, " heads"] | None = None,
        attention_mask: _Mask = None,
    ) -> Float[np.ndarray, "batch heads query_len key_len"]:
        """scale · q·k + bias in float32, -inf where a query may not see a key (SPEC.md §3).

        Args:
            config: of one layer.
            query: of the last positions: the last query stands at the last key.
            slopes: learned ones; None is those of the configuration.
            attention_mask: 1 for real keys, 0 for padding; None is 1 everywhere.
        """
        ...

    def attention(
        self,
        config: Config,
        query: Float[np.ndarray, "batch heads query_len head_dim"],
        key: Float[np.ndarray, "batch kv_heads key_len head_dim"],
        value: Float[np.ndarray, "batch kv_heads key_len head_dim"],
        slopes: Float[np.ndarray, " heads"] | None = None,
        attention_mask: _Mask = None,
    ) -> Float[np.ndarray, "batch heads query_len head_dim"]:
        """softmax(biased logits) · value; zeros for a query that sees no key (SPEC.md §4)."""
        ...

    def forward(
        self,
        config: Config,
        parameters: _Parameters,
        inputs: Num[np.ndarray, "batch seq *d_model"],
        attention_mask: _Mask = None,
    ) -> _Arrays:
        """The forward pass without dropout (SPEC.md §5).

        Args:
            inputs: tokens, or embeddings [batch, seq, d_model] without a vocabulary.

        Returns:
            "logits", or "output" without a vocabulary; and whatever it has of "embedding",
            "layers.i.biased_logits", "layers.i.attn" and "layers.i.ffn" (the residual branches),
            "layers.i" and "output".
        """
        ...

    def gradients(
        self,
        config: Config,
        parameters: _Parameters,
        inputs: Num[np.ndarray, "batch seq *d_model"],
        cotangent: Float[np.ndarray, "batch seq output_dim"],
        attention_mask: _Mask = None,
    ) -> _Parameters:
        """Gradient of Σ cotangent · (logits or output) with respect to every parameter, by name."""
        ...

    def decode(
        self,
        config: Config,
        parameters: _Parameters,
        inputs: Integer[np.ndarray, "batch seq"],
        lengths: Sequence[int],
        attention_mask: _Mask = None,
    ) -> Float[np.ndarray, "batch seq vocab"]:
        """The logits of all positions, read in parts of these lengths (SPEC.md §10).

        Keys and values are kept between the parts: the first is a prompt, most others one token.
        """
        ...

    def train_step(
        self,
        config: Config,
        recipe: Recipe,
        step: int,
        parameters: _Parameters,
        mean: _Parameters,
        mean_square: _Parameters,
        inputs: Integer[np.ndarray, "batch seq"],
        targets: Integer[np.ndarray, "batch seq"],
        attention_mask: _Mask = None,
    ) -> _Arrays:
        """One step of training without dropout (SPEC.md §18).

        Args:
            step: updates so far.
            mean: of the gradients so far, as AdamW keeps it, not corrected.
            mean_square: of their squares, likewise.
            targets: of every position, -100 for none.

        Returns:
            "loss", "grad_norm" (before clipping) and "learning_rate", without axes, and of every
            parameter "parameters/NAME", "mean/NAME" and "mean_square/NAME" after the step.
        """
        ...

    def sample(
        self,
        sampling: Mapping[str, Any],
        logits: Float[np.ndarray, "batch vocab"],
        is_there: Bool[np.ndarray, "batch vocab"],
        uniform: Float[np.ndarray, " batch"],
    ) -> _Arrays:
        """Which tokens are drawn (SPEC.md §11).

        Args:
            sampling: the options of `alibi_spec.sampling.Sampling`.
            is_there: tokens that have occurred.
            uniform: a number in [0, 1) for each row.

        Returns:
            "logits", processed, -inf for what cannot be drawn, and "tokens" [batch].
        """
        ...

    def uniforms(self, seed: int, rows: int, steps: int) -> Float[np.ndarray, "steps rows"]:
        """The numbers by which the rows of a batch draw their tokens (SPEC.md §11)."""
        ...

    def to_flax(self, config: Config, parameters: _Parameters) -> _Parameters:
        """The same elements in the layout of Flax, by the path of each leaf, joined by "/"."""
        ...
