"""What a model's plans say: the specification's certificate, of every layer, in both backends.

The plans of single calls: test_kernel_plans.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange

import alibi_flax
import alibi_torch
from alibi_cli.main import main
from alibi_convert import torch_to_flax
from alibi_spec import ALiBiConfig, certificate, model_slopes
from parity_tests.checkpoints import write
from parity_tests.compare import assert_bitwise

CONFIG = ALiBiConfig(
    num_layers=2, d_model=30, num_heads=5, num_kv_heads=1, vocab_size=256, init_std=0.3
)
SEQ, BLOCK = 300, 32
TOKENS = np.random.default_rng(0).integers(0, 256, (2, SEQ))
MASK = np.ones((2, SEQ), np.int64)
MASK[0, :70] = 0
MASK[1, 250:] = 0


def model(**changes: Any) -> alibi_torch.ALiBiLM:
    torch.manual_seed(0)
    config = ALiBiConfig.from_dict(CONFIG.to_dict() | changes)
    return alibi_torch.ALiBiLM(config).double().eval()


def queries_and_keys(ours: alibi_torch.ALiBiLM) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the projections of every layer give, caught on the way."""
    outputs: list[np.ndarray] = []

    def catch(_: Any, __: Any, output: torch.Tensor) -> None:
        pattern = "batch seq (heads head_dim) -> batch heads seq head_dim"
        outputs.append(rearrange(output.detach().numpy(), pattern, head_dim=6))

    layers: Any = ours.transformer.layers
    modules = [part for layer in layers for part in (layer.attn.query, layer.attn.key)]
    handles = [module.register_forward_hook(catch) for module in modules]
    ours(torch.from_numpy(TOKENS), torch.from_numpy(MASK))
    for handle in handles:
        handle.remove()
    return list(zip(outputs[::2], outputs[1::2], strict=True))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
@pytest.mark.parametrize("tolerance", ["dtype", 1e-3])
def test_plans_are_the_specifications(causal: bool, tolerance: str | float) -> None:
    _check_plans("paper", causal, tolerance)


def test_plans_see_learned_slopes() -> None:
    """The certificate takes the slopes of the moment, which differ from the paper's."""
    _check_plans("learned", causal=True, tolerance=1e-3)


def _check_plans(kind: str, causal: bool, tolerance: str | float) -> None:
    ours = model(causal=causal, slopes=kind)
    for name, parameter in ours.named_parameters():
        if name.endswith(".slopes"):
            parameter.data.mul_(0.6)
    options: dict[str, Any] = {"tolerance": tolerance, "block_size": BLOCK}
    found = {
        "torch": alibi_torch.model_plans(
            ours, torch.from_numpy(TOKENS), torch.from_numpy(MASK), **options
        ),
        "flax": alibi_flax.model_plans(
            alibi_flax.ALiBiLM(ours.config),
            torch_to_flax(ours.state_dict(), ours.config),
            jnp.asarray(TOKENS),
            jnp.asarray(MASK),
            **options,
        ),
    }
    slopes = model_slopes(ours.config)
    if kind == "learned":
        slopes = np.stack([layer.attn.slopes.detach() for layer in ours.transformer.layers])
    layers = queries_and_keys(ours)
    for backend, plans in found.items():
        assert len(plans) == len(layers) == CONFIG.num_layers
        for index, (plan, (query, key)) in enumerate(zip(plans, layers, strict=True)):
            expected = certificate.attention_plan(
                *(query, key, slopes[index]), causal=causal, attention_mask=MASK, **options
            )
            assert 0 < expected.share.min() < 1, "some blocks are left out"
            for name in ("first", "last", "share"):
                pair = getattr(plan, name), getattr(expected, name)
                values, wanted = (np.asarray(each).astype(np.float32) for each in pair)
                assert_bitwise(values, wanted, f"{backend} {index} {name}")


@pytest.mark.parametrize(
    "changes", [{"distance": "bfloat16"}, {"distance": "signed", "causal": False}]
)
def test_other_biases_have_no_plan(changes: dict[str, Any]) -> None:
    ours = model(**changes)
    with pytest.raises(ValueError, match=f"has no plan.*distance='{changes['distance']}'"):
        alibi_torch.model_plans(ours, torch.from_numpy(TOKENS))
    params = torch_to_flax(ours.state_dict(), ours.config)
    with pytest.raises(ValueError, match=f"has no plan.*distance='{changes['distance']}'"):
        alibi_flax.model_plans(alibi_flax.ALiBiLM(ours.config), params, jnp.asarray(TOKENS))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, text, picture = write(tmp_path / "model", config=CONFIG), tmp_path / "text", "w.png"
    text.write_bytes(bytes(TOKENS[0].astype(np.uint8)))
    command = ["plot-windows", str(source), "--length=300", "--block-size=32"]
    command += ["--text", str(text), "--output", str(tmp_path / picture)]
    assert main(command) == 0
    assert "for text" in capsys.readouterr().out
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert main(command) == 2
    assert "w.png exists; pass --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--json"]) == 0
    shares = np.array(json.loads(capsys.readouterr().out)["share"])
    ours = alibi_torch.ALiBiLM.from_pretrained(source).eval()
    plans = alibi_torch.model_plans(ours, torch.from_numpy(TOKENS[:1]), block_size=32)
    expected = np.stack([plan.share[0].numpy() for plan in plans])
    assert_bitwise(shares.astype(np.float32), expected, "share")
    assert main([*command, "--overwrite", "--length=301"]) == 2
    assert "text has 300 tokens; choose a longer text" in capsys.readouterr().err


def test_what_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random tokens without a text, random embeddings without a vocabulary."""
    bare = ALiBiConfig(num_layers=1, d_model=30, num_heads=5)
    odd = ALiBiConfig(num_layers=1, d_model=30, num_heads=5, vocab_size=23)
    for config, words in ((bare, "random embeddings"), (odd, "random tokens")):
        source = write(tmp_path / words.split()[1], config=config)
        command = ["plot-windows", str(source), "--length=40", f"--output={tmp_path / 'w.png'}"]
        assert main([*command, "--overwrite"]) == 0
        assert words in capsys.readouterr().out
        assert main([*command, "--overwrite", f"--text={source / 'config.json'}"]) == 2
    assert "has no tokenizer.json; add one" in capsys.readouterr().err
