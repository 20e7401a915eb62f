"""Conversions between families, by function and by command: proven by whoever can run the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import alibi_flax
import alibi_torch
import alibi_verify.logits
from alibi_cli.main import main
from alibi_convert import CheckpointError, MismatchError, convert, open_checkpoint, plan
from alibi_convert.families import FAMILIES, settle_ties
from alibi_convert.formats import FORMATS
from alibi_convert.formats.safetensors import write_safetensors
from alibi_convert.formats.shards import read_tensors
from alibi_convert.tensors import Tensors
from alibi_spec import ALiBiConfig
from alibi_spec.budgets import BUDGETS
from alibi_verify import verify_steps
from parity_tests.cases import CONFIGS, draw_parameters
from parity_tests.checkpoints import write
from parity_tests.compare import assert_bitwise
from parity_tests.families import redraw

FLOAT64 = BUDGETS["float64", "cpu"].forward
SIZES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 24, "n_layer": 2, "n_head": 3},
    "mpt": {"d_model": 24, "n_layers": 2, "n_heads": 3, "max_seq_len": 64},
    "falcon": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
}
IDS = {"bos_token_id": 7, "eos_token_id": 5, "pad_token_id": 3}
each_family = pytest.mark.parametrize("family", SIZES)


def published(path: Path, family: str) -> Path:
    """A folder as transformers writes it, in bfloat16, with no value at its default."""
    name = {"bloom": "Bloom", "mpt": "Mpt", "falcon": "Falcon"}[family]
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, f"{name}ForCausalLM")
    model = redraw(model_class(config_class(vocab_size=101, **SIZES[family], **IDS)))
    model.bfloat16().save_pretrained(path)
    return path


@each_family
def test_there_and_back(tmp_path: Path, family: str) -> None:
    """Proven on the way in and on the way out; the same bits and the same keys in the end."""
    source = published(tmp_path / "source", family)
    report = convert(source, tmp_path / "ours")
    logits = report.verification["logits"]
    assert (report.family, logits["against"]) == (family, f"transformers' {family}")
    assert set(logits["errors"]) == {"alibi_torch", "alibi_flax"}
    assert all(0 <= error <= logits["budget"] for error in logits["errors"].values())
    record = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert record["verification"] == {"bitwise": True, "logits": logits}
    assert record["source_config"] == json.loads((source / "config.json").read_text())

    report = convert(tmp_path / "ours", tmp_path / "back", to=family)
    assert report.verification["logits"]["against"] == f"transformers' {family}"
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "back")
    )
    assert {name: after[name] for name in before if name != "attn_config"} == {
        name: value for name, value in before.items() if name != "attn_config"
    }
    for name, value in after.get("attn_config", {}).items():
        assert before["attn_config"][name] == value, name
    stored, restored = read_tensors(source), read_tensors(tmp_path / "back")
    assert set(stored) == set(restored)
    for name in stored:
        assert_bitwise(restored[name], stored[name], name)
    again = convert(tmp_path / "back", tmp_path / "again", max_shard_size=10_000)
    assert again.destination_xxh3["config.json"] == record["destination_xxh3"]["config.json"]


@pytest.mark.parametrize("family", [*SIZES, "alibi"])
def test_tied_tensors_under_their_second_name(tmp_path: Path, family: str) -> None:
    """Of tensors that share their memory safetensors' own `save_model` keeps one, here the head."""
    if family == "alibi":
        source, first = (
            write(tmp_path / "source", config=CONFIGS["lm-tied"]),
            "token_embedding.weight",
        )
    else:
        source = published(tmp_path / "source", family)
        first = open_checkpoint(source).origins["token_embedding.weight"][0]
    expected = {name: array.copy() for name, array in open_checkpoint(source).tensors.items()}
    stored = {name: array.copy() for name, array in read_tensors(source).items()}
    second = stored | {"lm_head.weight": stored[first]}
    for names in ({first, "lm_head.weight"}, {"lm_head.weight"}):
        kept = {name: second[name] for name in {*stored, *names} if name in names or name != first}
        write_safetensors(source / "model.safetensors", Tensors.of(kept))
        found = open_checkpoint(source)
        assert list(found.derived) == ["lm_head.weight"] * (len(names) - 1)
        for name, array in expected.items():
            assert_bitwise(found.tensors[name], array, name)
    second["lm_head.weight"] = second["lm_head.weight"] + second["lm_head.weight"].dtype.type(1)
    write_safetensors(source / "model.safetensors", Tensors.of(second))
    with pytest.raises(CheckpointError, match=rf"lm_head.weight and {first} must be the same"):
        open_checkpoint(source)


def test_every_tied_name_may_be_the_only_one() -> None:
    """Of every family, importers included."""
    tied = {
        (family.name, each.pattern.replace("\\", ""), each.same_as)
        for family in FAMILIES
        for each in family.derived(ALiBiConfig(vocab_size=9))
        if each.same_as is not None
    }
    assert {"bloom", "mpt", "falcon", "btlm", "mosaicbert", "jina", "fairseq"} <= {
        family for family, _, _ in tied
    }
    for family, second, first in tied:
        derived = next(each for each in FAMILIES if each.name == family).derived
        alone = Tensors.of({second: np.arange(3.0)})
        settled = settle_ties(derived(ALiBiConfig(vocab_size=9)), alone)
        assert list(settled.tensors) == [first], family
        assert settled.other_names == {first: second}


def test_a_conversion_that_computes_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own outputs decide; a stray one stops the conversion, and nothing appears."""
    source = published(tmp_path / "source", "bloom")
    honest = alibi_verify.logits.peer_outputs

    def stray(*arguments: Any) -> np.ndarray:
        outputs = honest(*arguments).copy()
        outputs[1, 30, 50] += 1e-4 * np.abs(outputs[1]).max()
        return outputs

    monkeypatch.setattr("alibi_verify.logits.peer_outputs", stray)
    plain = tmp_path / "plain"
    convert(source, plain, verify="none")
    for origin, to, destination in ((source, "alibi", "ours"), (plain, "bloom", "copy")):
        with pytest.raises(
            MismatchError, match=r"alibi_torch differs from transformers' bloom by 1"
        ):
            convert(origin, tmp_path / destination, to=to)
        assert not (tmp_path / destination).exists()
    name = "outputs are those of transformers' bloom within 1e-05"
    for ours, theirs in ((source, plain), (plain, source)):
        check = next(each for each in verify_steps(ours, theirs) if each.name == name)
        assert not check.passed


def test_casts_are_proven_on_what_was_cast(tmp_path: Path) -> None:
    """bfloat16 costs more than float32 allows: the proof is of the names, not of the rounding."""
    source = published(tmp_path / "source", "bloom")
    convert(source, tmp_path / "wide", dtype="float32")
    convert(tmp_path / "wide", tmp_path / "odd", dtype="float16")
    report = convert(tmp_path / "odd", tmp_path / "narrow", to="bloom", dtype="bfloat16")
    assert report.casts
    assert report.verification["logits"]["against"] == "transformers' bloom"


def test_what_is_not_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published(tmp_path / "source", "mpt")
    values = json.loads((source / "config.json").read_text())
    values["attn_config"]["alibi_bias_max"] = 16
    (source / "config.json").write_text(json.dumps(values))
    report = convert(source, tmp_path / "other-slopes")
    logits = report.verification["logits"]
    assert logits["no_peer"] == "transformers' MPT ignores bias_max"
    assert logits["against"] == "alibi_torch"  # the backends prove each other
    assert (set(logits["errors"]), logits["dtype"]) == ({"alibi_flax"}, "float32")
    with monkeypatch.context() as patch:  # more than float32 can give: float64 settles it
        patch.setattr("alibi_verify.logits.BUDGET", FLOAT64)
        logits = convert(source, tmp_path / "exact").verification["logits"]
        assert logits["dtype"] == "float64"
        assert logits["errors"]["alibi_flax"] < FLOAT64

    monkeypatch.setattr("alibi_verify.logits.available_memory", lambda: 10**8)
    assert main(["convert", str(source), str(tmp_path / "large")]) == 0
    assert "outputs not compared: about 1,0" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "quick"), "--verify=none"]) == 0
    assert main(["convert", str(source), str(tmp_path / "read"), "--verify=bits"]) == 0
    for folder, reason, bitwise in (
        ("large", "bytes of memory are needed", True),
        ("quick", "switched off", False),
        ("read", "only bits", True),
    ):
        record = json.loads((tmp_path / folder / "conversion.json").read_text())
        assert reason in record["verification"]["logits"]["not_run"]
        assert record["verification"]["bitwise"] is record["verified"] is bitwise
    report = convert(tmp_path / "quick", tmp_path / "copy")
    assert "nothing was renamed" in report.verification["logits"]["not_run"]
    stored = {name: array.copy() for name, array in read_tensors(source).items()}
    stored["transformer.norm_f.weight"] = np.full_like(stored["transformer.norm_f.weight"], np.nan)
    write_safetensors(source / "model.safetensors", Tensors.of(stored))
    report = convert(source, tmp_path / "spoiled")
    assert report.nonfinite == {"transformer.final_norm.weight": 24}
    assert "NaN or infinity" in report.verification["logits"]["not_run"]


@pytest.mark.parametrize("to", ["mpt", "falcon", "jaketae"])
def test_what_another_family_cannot_express(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    source = published(tmp_path / "source", "bloom")
    destination = tmp_path / ("out.pt" if to == "jaketae" else "out")
    with pytest.raises(CheckpointError, match=rf"{to} cannot express \w+="):
        convert(source, destination, to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert not plan(source, destination, to=to).possible
    assert main(["plan", str(source), str(destination), "--to", to]) == 3
    assert f"problem: {to} cannot express" in capsys.readouterr().out


@pytest.mark.parametrize("to", [*SIZES, "jaketae"])
def test_slopes_that_no_family_has(tmp_path: Path, to: str) -> None:
    """Learned, or given: the family's own are what its library would compute with."""
    config = ALiBiConfig.jaketae(num_layers=2, d_model=24, num_heads=3)
    if to != "jaketae":
        config = open_checkpoint(published(tmp_path / "published", to)).config
    own = ((0.5, 0.25, 0.1),) * config.num_layers
    destination = tmp_path / ("out.pt" if to == "jaketae" else "out")
    learned = () if config.distance == "bfloat16" else ("learned",)  # which no model has together
    for number, slopes in enumerate((*learned, own[0], own)):
        source = write(tmp_path / str(number), config=replace(config, slopes=slopes))
        with pytest.raises(CheckpointError, match=rf"{to} cannot express slopes="):
            convert(source, destination, to=to)
    convert(write(tmp_path / "plain", config=config), destination, to=to, verify="none")


def test_the_seed_there_and_back(tmp_path: Path) -> None:
    """A jaketae/alibi state dict, buffers included, from a folder of ours and to it."""
    config = ALiBiConfig.jaketae(num_layers=2, d_model=24, num_heads=3, max_len=40, dropout=0.3)
    ours = write(tmp_path / "ours", config=config)
    report = convert(ours, tmp_path / "seed.pt", to="jaketae")
    assert set(report.verification["logits"]["errors"]) == {"alibi_flax"}
    state = torch.load(tmp_path / "seed.pt", weights_only=True)
    assert state["layers.1.attn.mask"].shape == (1, 1, 40, 40)
    assert state["layers.0.attn.kqv.weight"].shape == (72, 24)
    convert(tmp_path / "seed.pt", tmp_path / "back", allow_pt=True)
    back = open_checkpoint(tmp_path / "back")
    for name, array in draw_parameters(config).items():
        assert_bitwise(back.tensors[name], array, name)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published(tmp_path / "source", "falcon")
    assert main(["inspect", str(source)]) == 0
    assert "ALiBiLM, falcon (folder)" in capsys.readouterr().out
    assert main(["plan", str(source)]) == 0
    assert "from transformer.h.1.self_attention.query_key_value.weight" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "ours"), "--progress"]) == 0
    output = capsys.readouterr()
    assert "outputs against transformers' falcon: alibi_torch " in output.out
    for phase in ("transformers' falcon", "alibi_torch", "alibi_flax"):
        assert f"comparing outputs: {phase} in float32 [" in output.err
    assert main(["verify", str(source), str(tmp_path / "ours"), "--new-tokens=4"]) == 0
    assert "ok   outputs are those of transformers' falcon within 1e-05" in capsys.readouterr().out


def test_a_config_json_of_a_family_for_files_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--config FILE`: for tensors under the family's names, or ours, or of Flax."""
    source = published(tmp_path / "source", "bloom")
    values = json.loads((source / "config.json").read_text())
    expected = open_checkpoint(source)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_safetensors(ours, expected.tensors)
    write_safetensors(theirs, read_tensors(source))
    FORMATS["msgpack"].write(tmp_path / "flax.msgpack", expected.config, expected.tensors)
    (tmp_path / "flax.msgpack.json").unlink()
    for path in (ours, theirs, tmp_path / "flax.msgpack"):
        found = open_checkpoint(path, config=values)
        assert found.config == expected.config
        for name, array in expected.tensors.items():
            assert_bitwise(found.tensors[name], array, name)
        config = str(source / "config.json")
        arguments = [str(path), str(path.with_suffix("")), "--config", config, "--verify", "none"]
        assert main(["convert", *arguments]) == 0
        model = alibi_torch.ALiBiLM.from_pretrained(path, config=values)
        assert model.config == alibi_flax.from_pretrained(path, config=values)[0].config
    assert open_checkpoint(source, config=values).config == expected.config
    with pytest.raises(CheckpointError, match=r"not that of .*: they differ in norm_eps"):
        open_checkpoint(source, config=values | {"layer_norm_epsilon": 0.1})
    with pytest.raises(CheckpointError, match=r"given is of no known family \(model_type 'gpt2'"):
        open_checkpoint(ours, config={"model_type": "gpt2"})
    convert(tmp_path / "theirs", tmp_path / "back", to="bloom", verify="none")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["eos_token_id"] == IDS["eos_token_id"]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("family", "keys", "names", "reason"),
    [
        ("mpt", {"model_type": "mosaic_gpt"}, {}, "does not know its model_type"),
        ("mpt", {"norm_eps": 0.01, "layer_norm_epsilon": None}, {}, "does not read this folder"),
        ("mpt", {}, {"norm_1": "ln_1", "ffn": "mlp"}, "does not know these names"),
        ("mpt", {"id2label": 7}, {}, "does not read this folder"),
        ("falcon", {"model_type": "RefinedWebModel"}, {}, "does not know its model_type"),
        ("falcon", {"n_head": 3, "num_attention_heads": None}, {}, "transformers "),
        ("bloom", {"auto_map": {"AutoModelForCausalLM": "m.M"}}, {}, None),
    ],
)
def test_folders_that_transformers_misunderstands(
    tmp_path: Path, family: str, keys: dict[str, Any], names: dict[str, str], reason: str | None
) -> None:
    """What we read and it does not is converted all the same, proven by the backends."""
    source = published(tmp_path / "source", family)
    values = json.loads((source / "config.json").read_text()) | keys
    values = {name: value for name, value in values.items() if value is not None}
    (source / "config.json").write_text(json.dumps(values))
    stored = {name: array.copy() for name, array in read_tensors(source).items()}
    for new, old in names.items():
        stored = {name.replace(f".{new}.", f".{old}."): stored[name] for name in stored}
    write_safetensors(source / "model.safetensors", Tensors.of(stored))
    logits = convert(source, tmp_path / "ours").verification["logits"]
    if reason is None:
        assert logits["against"] == f"transformers' {family}"
    else:
        assert reason in logits["no_peer"]
        assert (logits["against"], set(logits["errors"])) == ("alibi_torch", {"alibi_flax"})
    convert(tmp_path / "ours", tmp_path / "back", to=family)
    kept = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (kept["model_type"], kept["pad_token_id"]) == (family, 3)
    assert "auto_map" not in kept


def test_flat_configurations_come_back_nested(tmp_path: Path) -> None:
    """Keys of an older dialect are not mixed with those of the newer one; nor lost in two hops."""
    source = published(tmp_path / "source", "mpt")
    values = json.loads((source / "config.json").read_text())
    attention = values.pop("attn_config")
    flat = {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "softmax_scale": None}
    (source / "config.json").write_text(json.dumps(values | flat | {"prefix_lm": False}))
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "narrow", dtype="float16")
    convert(tmp_path / "narrow", tmp_path / "back", to="mpt")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["attn_config"].items() <= attention.items()
    assert not flat.keys() & back.keys()
    assert back["eos_token_id"] == IDS["eos_token_id"]


def test_a_cast_within_a_family_keeps_its_keys(tmp_path: Path) -> None:
    """Without a folder of ours between them."""
    source = published(tmp_path / "source", "bloom")
    convert(source, tmp_path / "narrow", to="bloom", dtype="float16", verify="bits")
    found = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert found.items() >= IDS.items()


def test_a_stale_configuration_goes_with_its_model(tmp_path: Path) -> None:
    """A .pt of ours, replaced by one that needs no configuration beside it."""
    config = ALiBiConfig.jaketae(num_layers=1, d_model=24, num_heads=3, max_len=40)
    convert(write(tmp_path / "other"), tmp_path / "model.pt")
    ours = write(tmp_path / "ours", config=config)
    with pytest.raises(CheckpointError, match=r"model\.pt exists"):
        convert(ours, tmp_path / "model.pt", to="jaketae")
    assert (tmp_path / "model.pt.json").exists()
    convert(ours, tmp_path / "model.pt", to="jaketae", overwrite=True)
    assert not (tmp_path / "model.pt.json").exists()
    assert open_checkpoint(tmp_path / "model.pt", allow_pt=True).family == "jaketae"


@pytest.mark.parametrize("family", ["bloom", "alibi"])
def test_more_layers_than_tensors(tmp_path: Path, family: str) -> None:
    """A configuration of two billion layers is refused at once."""
    source = published(tmp_path / "source", "bloom")
    field = "n_layer"
    if family == "alibi":
        source, field = write(tmp_path / "ours"), "num_layers"
    values = json.loads((source / "config.json").read_text()) | {field: 2 * 10**9}
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"has 2,000,000,000 layers, the file \d+ tensors"):
        open_checkpoint(source)
