"""Our models as models of transformers: the same numbers, in its names and folders.

Its own programs, and others that call it, are in `clients`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DynamicCache,
    StaticCache,
)

import alibi_flax
import alibi_torch
from alibi_convert import CheckpointError, open_checkpoint
from alibi_spec import ALiBiConfig
from alibi_spec.budgets import BUDGETS
from alibi_torch import ALiBiLM, generate, trace
from alibi_torch.transformers import ALiBiDuoConfig
from parity_tests.cases import CONFIGS
from parity_tests.compare import assert_bitwise, assert_gradients_within, assert_within
from parity_tests.families import redraw

LIMIT = BUDGETS["float32", "cpu"].forward
SEQ, VOCAB = 40, 101
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (3, SEQ)))
MASK = torch.ones(3, SEQ, dtype=torch.long)
MASK[0, :9] = 0
DECODERS = ["lm-tied", "lm-untied", "bloom-like", "grouped", "gated-rms", "falcon", "learned"]
OTHERS = {
    "falcon": ALiBiConfig(
        num_layers=2, d_model=48, num_heads=3, vocab_size=VOCAB, distance="bfloat16"
    ),
    "learned": ALiBiConfig(
        num_layers=2, d_model=48, num_heads=3, vocab_size=VOCAB, slopes="learned"
    ),
    "headless": ALiBiConfig(
        num_layers=2, d_model=48, num_heads=3, vocab_size=VOCAB, causal=False, head="none"
    ),
    "without dropout": ALiBiConfig(
        num_layers=2, d_model=48, num_heads=3, vocab_size=VOCAB, dropout=0.0
    ),
}


def ours(name: str, folder: Path) -> ALiBiLM:
    """A model, saved as our folder."""
    model = ALiBiLM((CONFIGS | OTHERS)[name])
    redraw(model)
    if model.config.slopes == "learned":
        with torch.no_grad():
            for layer in model.transformer.layers:
                layer.attn.slopes.copy_(torch.tensor([0.5, 0.1, 0.02]))
    model.save_pretrained(folder)
    return model.eval()


def theirs(folder: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return kind.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoders(name: str, tmp_path: Path) -> None:
    """Logits, hidden states, and tokens that a cache of theirs continues, past padding."""
    model = ours(name, tmp_path / "ours")
    other = theirs(tmp_path / "ours")
    found = other(TOKENS, MASK, output_hidden_states=True)
    assert_bitwise(found.logits.numpy(), model(TOKENS, MASK).numpy(), "logits")
    states = trace(model, TOKENS, MASK)
    names = ["embedding", *(f"layers.{index}" for index in range(2))]
    expected = [*(states[name] for name in names[:-1]), states["output"]]
    for index, (state, exact) in enumerate(zip(found.hidden_states, expected, strict=True)):
        assert_bitwise(state.numpy(), exact.numpy(), f"hidden state {index}")
    limits: Any = {"max_new_tokens": 12, "do_sample": False}
    tokens = other.generate(TOKENS, attention_mask=MASK, **limits)
    assert torch.equal(tokens, generate(model, TOKENS, 12, attention_mask=MASK).tokens)
    without = other.generate(TOKENS, attention_mask=MASK, use_cache=False, **limits)
    assert torch.equal(tokens, without)


@pytest.mark.parametrize("name", ["masked-lm", "headless", "lm-tied"])
@torch.no_grad()
def test_encoders_and_bare_models(name: str, tmp_path: Path) -> None:
    model = ours(name, tmp_path / "ours")
    types: Any = {"token_type_ids": TOKENS % 2} if model.config.type_vocab_size else {}
    if name == "masked-lm":
        found = theirs(tmp_path / "ours", AutoModelForMaskedLM)(TOKENS, MASK, **types).logits
        assert_bitwise(found.numpy(), model(TOKENS, MASK, **types).numpy(), "logits")
    found = theirs(tmp_path / "ours", AutoModel)(TOKENS, MASK, **types).last_hidden_state
    exact = model.transformer(model.embed(TOKENS, *types.values()), MASK)
    assert_bitwise(found.numpy(), exact.numpy(), "hidden states")


@pytest.mark.parametrize("name", ["lm-untied", "learned", "masked-lm"])
def test_what_transformers_saves_is_a_folder_of_ours(name: str, tmp_path: Path) -> None:
    """Also in several files, in bfloat16, and after it has been opened as a bare model."""
    model = ours(name, tmp_path / "ours")
    kind = AutoModelForMaskedLM if name == "masked-lm" else AutoModelForCausalLM
    other = theirs(tmp_path / "ours", kind)
    other.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    theirs(tmp_path / "ours", AutoModel).save_pretrained(tmp_path / "bare")
    for folder in ("saved", "bare"):
        again = ALiBiLM.from_pretrained(tmp_path / folder)
        assert again.config == model.config
        for key, array in model.state_dict().items():
            assert_bitwise(again.state_dict()[key].numpy(), array.numpy(), key)
    _, params = alibi_flax.from_pretrained(tmp_path / "saved")
    embedding = np.asarray(params["token_embedding"]["embedding"])
    assert_bitwise(embedding, model.token_embedding.weight.detach().numpy(), "in Flax")
    assert open_checkpoint(tmp_path / "saved").family == "alibi-duo"
    reopened = theirs(tmp_path / "saved", kind).state_dict()
    for key, array in other.state_dict().items():
        assert_bitwise(reopened[key].numpy(), array.numpy(), key)
    narrow = theirs(tmp_path / "ours", kind, dtype=torch.bfloat16)
    wide = [key for key, array in narrow.state_dict().items() if array.dtype is torch.float32]
    assert wide == [key for key in narrow.state_dict() if key.endswith("slopes")]


def test_losses_and_gradients(tmp_path: Path) -> None:
    """Labels are shifted; blocks that are computed again give the same gradients."""
    model = ours("without dropout", tmp_path / "ours")
    other = theirs(tmp_path / "ours").train()
    again = copy.deepcopy(other)
    again.activation_checkpointing_enable()
    assert again.lm.transformer.recompute
    assert not other.lm.transformer.recompute
    labels = TOKENS.masked_fill(MASK == 0, -100)
    logits = model(TOKENS, MASK)[:, :-1].flatten(0, 1)
    exact = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    gradients = []
    for each in (other, again):
        found = each(TOKENS, MASK, labels=labels)
        assert found.past_key_values is None
        assert_within(found.loss.detach().numpy(), exact.detach().numpy(), LIMIT, "loss")
        found.loss.backward()
        gradients.append({key: value.grad.numpy() for key, value in each.named_parameters()})
    assert_gradients_within(*gradients, BUDGETS["float32", "cpu"].gradient, "recomputed")


@torch.no_grad()
def test_packed_documents(tmp_path: Path) -> None:
    """Positions that begin again, without a mask, are documents that do not see one another."""
    model = ours("lm-tied", tmp_path / "ours")
    other = theirs(tmp_path / "ours")
    positions = torch.cat([torch.arange(25), torch.arange(SEQ - 25)])[None].expand(3, -1)
    found = other(TOKENS, position_ids=positions, use_cache=False).logits
    parts = [model(TOKENS[:, :25]), model(TOKENS[:, 25:])]
    assert_within(found.numpy(), torch.cat(parts, dim=1).numpy(), LIMIT, "packed")
    plain = other(TOKENS, position_ids=torch.arange(SEQ)[None], use_cache=False).logits
    assert_bitwise(plain.numpy(), model(TOKENS).numpy(), "one document")
    for each in (positions, (MASK.cumsum(1) - 1).clamp(0)):
        masked = other(TOKENS, MASK, position_ids=each, use_cache=False).logits
        assert_bitwise(masked.numpy(), model(TOKENS, MASK).numpy(), "padding")


@torch.no_grad()
def test_a_cache_of_theirs_in_parts(tmp_path: Path) -> None:
    """Past the length where slopes are interpolated, as in one call."""
    model = ours("gated-rms", tmp_path / "ours")
    other = theirs(tmp_path / "ours")
    tokens = TOKENS.repeat(1, 4)
    mask = torch.cat([MASK, torch.ones(3, 3 * SEQ, dtype=torch.long)], dim=1)
    cache = DynamicCache()
    other(tokens[:, :150], mask[:, :150], past_key_values=cache, logits_to_keep=1)
    found = other(tokens[:, 150:], mask, past_key_values=cache).logits
    _, kept = model(
        tokens[:, :150], mask[:, :150], cache=alibi_torch.KVCache.empty(model.config, 3, 160)
    )
    exact, _ = model(tokens[:, 150:], mask[:, 150:], cache=kept)
    assert_within(found.numpy(), exact.numpy(), LIMIT, "the second part")


def test_bad_input(tmp_path: Path) -> None:
    ours("lm-tied", tmp_path / "decoder")
    ours("masked-lm", tmp_path / "encoder")
    decoder = theirs(tmp_path / "decoder")
    for options, message in (
        ({"inputs_embeds": torch.zeros(1, 2, 48)}, "pass input_ids, no inputs_embeds"),
        ({"input_ids": TOKENS, "output_attentions": True}, "leave output_attentions out"),
        ({"input_ids": TOKENS, "attention_mask": MASK[:, None, None]}, "has 4 axes; expected"),
        (
            {
                "input_ids": TOKENS,
                "past_key_values": StaticCache(config=decoder.config, max_cache_len=50),
            },
            "StaticCache gives 50 keys where 40 were read; use a DynamicCache",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            decoder(**options)
    with pytest.raises(ValueError, match="this is an encoder with head='masked_lm'; expected a"):
        theirs(tmp_path / "encoder")
    with pytest.raises(ValueError, match="this is a decoder with head='linear'; expected an"):
        theirs(tmp_path / "decoder", AutoModelForMaskedLM)
    with pytest.raises(NotImplementedError, match="the vocabulary of this model has one size"):
        decoder.resize_token_embeddings(7)
    with pytest.raises(ValueError, match="d_model=7"):
        ALiBiDuoConfig(hidden_size=7, num_heads=2, vocab_size=5)
    assert AutoConfig.from_pretrained(tmp_path / "decoder").options == CONFIGS["lm-tied"]


def test_folders_that_lack_something(tmp_path: Path) -> None:
    ours("lm-tied", tmp_path / "ours")
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(values | {"num_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks 16 of the model's parameters, lm\.transformer"):
        theirs(tmp_path / "ours")
    quantized = values | {"quantization_config": {"quant_method": "other"}}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(CheckpointError, match="quantization_config"):
        ALiBiLM.from_pretrained(tmp_path / "ours")
