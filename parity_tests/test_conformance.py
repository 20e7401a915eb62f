"""The kit for third implementations: its data, who passes it, and what it finds."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alibi_cli.main import main
from alibi_cli.rendering import outcome_line
from alibi_spec.budgets import AGREEMENTS, BUDGETS, DRAWING, gradient_floor
from alibi_spec.conformance import (
    LEVELS,
    Case,
    DamagedKitError,
    Implementation,
    read_cases,
    write_cases,
)
from alibi_spec.conformance.cases import all_cases
from alibi_spec.conformance.files import DATA, MANIFEST
from alibi_spec.conformance.reference import Reference
from alibi_spec.sampling import boundary_distance
from alibi_verify.conformance import (
    Conformance,
    Outcome,
    conformance,
    outcome_of,
)
from alibi_verify.conforming import Flax, Torch
from alibi_verify.factories import made_by
from alibi_verify.programs import Program
from parity_tests import third_party
from parity_tests.compare import assert_bitwise, assert_within

ROOT = Path(__file__).parent.parent
README = DATA.parent / "README.md"
REFERENCE = "alibi_spec.conformance.reference:Reference"
BY_DIFFERENCES = ("gradients", "training")  # thousands of runs of the reference
QUICK = tuple(level for level in LEVELS if level not in BY_DIFFERENCES)
EVERY = tuple(LEVELS)
THIRD_PARTY = ("bias", "attention", "model", "gradients", "cache")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("levels", [QUICK, slow(BY_DIFFERENCES)], ids=["quick", "differences"])
def test_the_files_hold_what_the_reference_says(levels: tuple[str, ...]) -> None:
    """Inputs to the bit. Results to one rounding: sums and exponentials differ between machines."""
    limit = AGREEMENTS["kit"].relative
    stored, fresh = list(read_cases(levels)), list(all_cases(levels))
    assert [_described(case) for case in stored] == [_described(case) for case in fresh]
    for case, again in zip(stored, fresh, strict=True):
        assert case.inputs.keys() == again.inputs.keys(), case.title
        for name, array in again.inputs.items():
            assert_bitwise(case.inputs[name], array, f"{case.title} {name}")
        assert list(case.expected) == list(again.expected), case.title
        floor = _floor(case)
        for name, array in again.expected.items():
            what = f"{case.title} {name}"
            assert_within(case.expected[name], array, limit, what, floor=floor)


def _described(case: Case) -> tuple[Any, ...]:
    return case.level, case.name, case.shows, case.budget, case.options


def _floor(case: Case) -> float:
    """Gradients that are zero in theory hold rounding alone."""
    return gradient_floor(case.expected) if case.level in BY_DIFFERENCES else 0.0


def test_writing_is_deterministic(tmp_path: Path) -> None:
    levels = ("bias", "model", "sampling")
    for folder in ("once", "again"):
        write_cases(all_cases(levels), tmp_path / folder)
    files = sorted(file.name for file in (tmp_path / "once").iterdir())
    assert len(files) == len(list(read_cases(levels))) + 1
    for file in files:
        once, again = ((tmp_path / folder / file).read_bytes() for folder in ("once", "again"))
        assert once == again, file
    for case, read in zip(all_cases(levels), read_cases(levels, tmp_path / "once"), strict=True):
        assert _described(read) == _described(case)


@pytest.mark.slow
def test_one_command_writes_the_kit(tmp_path: Path) -> None:
    """With NumPy and safetensors alone."""
    program = (
        "import runpy, sys\n"
        "sys.modules |= dict.fromkeys(('torch', 'jax', 'flax', 'einops', 'ml_dtypes'))\n"
        f"sys.argv[1:] = [{str(tmp_path / 'kit')!r}]\n"
        "runpy.run_module('alibi_spec.conformance', run_name='__main__')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    found, kept = (
        sorted(file.name for file in folder.iterdir()) for folder in (tmp_path / "kit", DATA)
    )
    assert found == kept


def test_the_manifest_has_every_file() -> None:
    """The hash of each, no file besides, and all of them small."""
    manifest = json.loads((DATA / MANIFEST).read_text(encoding="utf-8"))
    hashes = {row["file"]: row["sha256"] for row in manifest["cases"]}
    files = {file.name: file.read_bytes() for file in DATA.iterdir() if file.name != MANIFEST}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == hashes
    assert sum(map(len, files.values())) < 2**20
    assert len({(row["level"], row["name"]) for row in manifest["cases"]}) == len(hashes)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_cases(all_cases(["seeds"]), tmp_path)
    file = tmp_path / "seeds-small.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedKitError, match=r"seeds-small\.safetensors is damaged: its SHA-256"):
        list(read_cases(["seeds"], tmp_path))


def test_the_cases_are_telling() -> None:
    """What each is there for does happen in it."""
    cases = {case.title: case for case in read_cases()}
    for name in ("powers-of-two", "far-keys"):
        case = cases[f"bias/{name}"]
        exact = Reference().biased_logits(**case.arguments)
        assert_bitwise(case.expected["biased_logits"].astype(np.float64), exact, name)
    sees_no_key = (cases["attention/powers-of-two"].expected["attention"] == 0).all(axis=-1)
    assert 0 < sees_no_key.sum() < sees_no_key.size
    clipped = cases["training/clipped"]
    limit = clipped.options["recipe"]["max_grad_norm"]
    assert clipped.expected["grad_norm"] > 2 * limit
    clip = cases["model/mpt-like"].options["config"]["qkv_clip"]
    assert (np.abs(cases["model/mpt-like"].expected["layers.0.query"]) == clip).any()
    for name, case in cases.items():
        if case.level == "sampling":
            kept = Reference().sample(**case.arguments)["logits"]
            assert boundary_distance(kept, case.inputs["uniform"]).min() > 2 * DRAWING, name
            assert np.isfinite(kept).any(axis=1).all()
        if case.level == "conversion":
            values = np.concatenate([array.ravel() for array in case.inputs.values()])
            assert len(set(values.tolist())) == values.size, name


@pytest.mark.parametrize(
    ("create", "levels"),
    [
        pytest.param(Reference, QUICK, id="reference"),
        pytest.param(Reference, EVERY, id="reference-every", marks=pytest.mark.slow),
        pytest.param(Torch, EVERY, id="torch"),
        pytest.param(Flax, ("sampling", "conversion"), id="flax"),
        pytest.param(Flax, EVERY, id="flax-every", marks=pytest.mark.slow),
        pytest.param(lambda: Torch("float64"), EVERY, id="torch-float64"),
        pytest.param(lambda: Flax("float64"), ("bias",), id="flax-64", marks=pytest.mark.slow),
        pytest.param(lambda: Torch("bfloat16"), ("bias", "attention", "model"), id="torch-16"),
    ],
)
def test_ours_conform(create: Any, levels: tuple[str, ...]) -> None:
    result = conformance(create(), levels)
    assert [outcome for outcome in result.outcomes if outcome.status != "ok"] == []
    assert result.levels == dict.fromkeys(levels, "conforms")
    assert result.passed


@pytest.mark.slow
def test_differences_are_gradients() -> None:
    """Those of the files are torch's in float64, to one rounding of float32."""
    for case in read_cases(["gradients"]):
        found = Torch("float64").gradients(**case.arguments)
        for name, gradient in case.expected.items():
            limit, floor = AGREEMENTS["kit"].relative, _floor(case)
            exact = found[name].astype(np.float64)
            what = f"{case.title} {name}"
            assert_within(gradient.astype(np.float64), exact, limit, what, floor=floor)


@pytest.mark.parametrize("levels", [("bias", "attention"), slow(THIRD_PARTY)])
def test_a_third_party_conforms(levels: tuple[str, ...]) -> None:
    """80 lines of jax.numpy, which refuse two configurations."""
    result = conformance(third_party.create(), levels)
    not_ok = {outcome.case: outcome for outcome in result.outcomes if outcome.status != "ok"}
    refused = [f"{level}/{name}" for level, name in REFUSED.items() if level in levels]
    assert list(not_ok) == refused
    assert all(outcome.status == "refused" for outcome in not_ok.values())
    verdicts = {each: "conforms in part" if each in REFUSED else "conforms" for each in levels}
    assert result.levels == verdicts
    assert result.passed


REFUSED = {"bias": "falcon-rw", "model": "gated-rms"}


def test_the_third_party_is_short() -> None:
    lines = (ROOT / "parity_tests/third_party.py").read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 80


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mistake in the third party, and the first case and tensor by which it is found."""

    before: str
    after: str
    level: str
    case: str
    tensor: str


FAULTS = {
    "slopes of odd heads": Fault(
        "np.arange(1, 2 * (n - power), 2) / 2",
        "np.arange(1, n - power + 1) / 2",
        *("bias", "far-keys-odd-heads", "biased_logits"),
    ),
    "bias times the scale": Fault(
        '(config["attention_scale"] or query.shape[3] ** -0.5) * products + bias',
        '(config["attention_scale"] or query.shape[3] ** -0.5) * (products + bias)',
        *("bias", "powers-of-two", "biased_logits"),
    ),
    "causal mask off by one": Fault(
        "(relative <= 0)", "(relative <= 1)", *("bias", "powers-of-two", "biased_logits")
    ),
    "tanh for exact GELU": Fault(
        'approximate=c["activation"] == "gelu_tanh"',
        "approximate=True",
        *("model", "jaketae", "layers.0"),
    ),
    "padding of the prompt ignored by steps": Fault(
        "step(inputs[:, start:end], mask[:, :end], cache)",
        "step(inputs[:, start:end], mask[:, :end] | (start > 0), cache)",
        *("cache", "padded-prompts", "logits"),
    ),
    "bias from the first position": Fault(
        "np.arange(n - query.shape[2], n)[:, None]",
        "np.arange(query.shape[2])[:, None]",
        *("bias", "far-keys", "biased_logits"),
    ),
    "shared heads in another order": Fault(
        "value.repeat(query.shape[1] // value.shape[1], 1)",
        "jnp.tile(value, (1, query.shape[1] // value.shape[1], 1, 1))",
        *("attention", "grouped-heads", "attention"),
    ),
    "no gradient of slopes": Fault(
        'parameters.get(f"{at}.attn.slopes")',
        'jax.lax.stop_gradient(parameters.get(f"{at}.attn.slopes"))',
        *("gradients", "learned-slopes", "transformer.layers.0.attn.slopes"),
    ),
}
_QUICK_FAULTS = ("bias", "attention")


@pytest.mark.parametrize(
    "fault", [name if FAULTS[name].level in _QUICK_FAULTS else slow(name) for name in FAULTS]
)
def test_faults_are_found_at_their_level(fault: str) -> None:
    row = FAULTS[fault]
    below = THIRD_PARTY[: THIRD_PARTY.index(row.level)]
    result = conformance(_faulty(row), [*below, row.level])
    first = next(outcome for outcome in result.outcomes if outcome.status == "failed")
    assert (first.case, first.tensor) == (f"{row.level}/{row.case}", row.tensor)
    assert first.error > first.limit
    assert re.search(r"errs by .* most at \[\d+.*\]: \S+ instead of \S+", first.found)
    assert result.levels[row.level] == "fails"
    assert "fails" not in {result.levels[level] for level in below}
    assert not result.passed
    if row.case == "far-keys":
        assert f"    {outcome_line(first)}\n" in README.read_text(encoding="utf-8")


def _faulty(row: Fault) -> Any:
    code = (ROOT / "parity_tests/third_party.py").read_text(encoding="utf-8")
    assert row.before in code
    module = types.ModuleType("faulty")
    exec(code.replace(row.before, row.after), vars(module))
    return module


class Seeds:
    """An implementation of the smallest level, to be wrong in every way."""

    name = "seeds"

    def __init__(self, change: Any = lambda array: array, **attributes: Any) -> None:
        self.change = change
        vars(self).update(attributes)

    def uniforms(self, seed: int, rows: int, steps: int) -> Any:
        return self.change(Reference().uniforms(seed, rows, steps))


def _raise(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda array: array.T, "uniforms has shape [3, 5], expected [5, 3]"),
        (lambda array: (array * 8).astype(int), "uniforms has dtype int64, expected float32"),
        (lambda array: array > 0, "uniforms has dtype bool, expected float32"),
        (lambda array: array.astype(str), "uniforms has dtype <U"),
        (lambda _: _raise(KeyError("x")), "raised KeyError: 'x'"),
        (
            lambda array: np.where(array == array[2, 1], np.nan, array),
            "most at [2, 1]: nan instead",
        ),
        (lambda array: np.nextafter(array, 1), "uniforms errs by 6"),
        (lambda array: array * np.inf, "uniforms errs by inf, and must be exact; most at [0, 0]"),
    ],
)
def test_what_is_wrong_is_said(change: Any, found: str) -> None:
    result = conformance(Seeds(change))
    assert {outcome.status for outcome in result.outcomes} == {"failed"}
    assert found in result.outcomes[0].found
    assert result.levels == dict.fromkeys(LEVELS, "not offered") | {"seeds": "fails"}
    assert not result.passed
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["passed"] is False


def test_names_are_compared() -> None:
    case = next(read_cases(["sampling"]))
    right = Reference().sample(**case.arguments)

    def outcome(found: Any) -> str:
        implementation = types.SimpleNamespace(sample=lambda **_: found)
        return outcome_of(implementation, case, BUDGETS["float32", "cpu"]).found

    assert outcome({"tokens": right["tokens"]}) == "logits is missing, and 0 others"
    assert outcome(right | {"x": 1}) == "'x' is not expected; known are logits, tokens"
    assert outcome(right["logits"]) == "returned ndarray, expected arrays by name"
    wrong = {"logits": right["logits"], "tokens": right["tokens"] + 1}
    assert outcome(wrong).startswith("tokens errs by")
    assert outcome({"logits": -right["logits"], "tokens": right["tokens"]}).startswith(
        "logits errs"
    )


def test_of_a_model_the_logits_are_enough() -> None:
    case = next(case for case in read_cases(["model"]) if case.name == "odd-heads")
    trace = Reference().forward(**case.arguments)

    def outcome(found: Mapping[str, np.ndarray]) -> Outcome:
        implementation = types.SimpleNamespace(forward=lambda **_: found)
        return outcome_of(implementation, case, BUDGETS["float32", "cpu"])

    assert outcome({"logits": trace["logits"]}).status == "ok"
    assert outcome({"output": trace["output"]}).found.startswith("logits is missing")
    wrong = {name: trace[name] for name in ("layers.1", "output", "logits")}
    wrong["output"] = wrong["output"] + 1
    assert outcome(wrong).tensor == "output"


def test_implementations_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'json' names no implementation; expected module:fac"):
        made_by("json", "implementation")
    with pytest.raises(ValueError, match=r"nowhere cannot be imported from .*: No module"):
        made_by("nowhere:x", "implementation")
    with pytest.raises(ValueError, match="json has no factory nothing; expected a function"):
        made_by("json:nothing", "implementation")
    with pytest.raises(ValueError, match=r"json:dumps gives no implementation: TypeError: "):
        made_by("json:dumps", "implementation")
    with pytest.raises(ValueError, match=r"dict has none of the kit's functions; expected some"):
        conformance({})
    with pytest.raises(ValueError, match="seeds does not offer the level cache; expected a func"):
        conformance(Seeds(), ["cache"])
    with pytest.raises(ValueError, match="seeds computes in int8 on cpu, which has no budget"):
        conformance(Seeds(dtype="int8"))
    assert conformance(Seeds(dtype="float64", device="gpu")).device == "gpu"


def test_an_update_that_is_a_thousandth_too_long() -> None:
    """Beside the weights it would look small."""
    case = next(read_cases(["training"]))
    right = {name: array.astype(np.float64) for name, array in case.expected.items()}

    def found(stretch: float) -> str:
        longer = {
            name: case.inputs[name] + stretch * (array - case.inputs[name])
            for name, array in right.items()
            if name.startswith("parameters/")
        }
        implementation = types.SimpleNamespace(train_step=lambda **_: right | longer)
        return outcome_of(implementation, case, BUDGETS["float32", "cpu"]).status

    assert (found(1.0), found(1.001)) == ("ok", "failed")


@pytest.mark.parametrize("implementation", [Reference, Torch, Flax, third_party])
def test_functions_are_called_by_these_names(implementation: Any) -> None:
    for level in LEVELS.values():
        function = getattr(implementation, level.function, None)
        if function is not None:
            protocol = list(inspect.signature(getattr(Implementation, level.function)).parameters)
            ours = [each for each in inspect.signature(function).parameters if each != "cache"]
            assert ours == protocol[implementation is third_party :], level.function


def test_a_level_that_is_all_refused() -> None:
    result = conformance(Seeds(lambda _: _raise(NotImplementedError("no Philox"))))
    assert result.levels["seeds"] == "refused"
    assert result.outcomes[0].found == "refused: no Philox"
    assert not result.passed


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit codes 0, 1 and 2; a module of the current folder; JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    words = ["conformance", REFERENCE, "--level", "seeds", "--level", "bias"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ok   bias/powers-of-two: biased_logits is exact"
    assert lines[-2:] == ["alibi_spec, float32 on cpu", "  conforms: bias, seeds"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["levels"] == {"bias": "conforms", "seeds": "conforms"}
    assert len(result["outcomes"]) == len(list(read_cases(["bias", "seeds"])))
    code = "class Half:\n    def uniforms(self, seed, rows, steps):\n        raise MemoryError\n"
    (tmp_path / "ours_in_the_making.py").write_text(code)
    assert main(["conformance", "ours_in_the_making:Half"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == f"FAIL seeds/small: raised MemoryError:  ({tmp_path / 'ours_in_the_making.py'}, line 3)"
    )
    assert lines[-2] == "  not offered: " + ", ".join(each for each in LEVELS if each != "seeds")
    assert lines[-1] == "  fails: seeds"
    assert main(["conformance", "nowhere:x"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere cannot be imported")
    with pytest.raises(SystemExit) as usage:
        main(["conformance"])
    assert usage.value.code == 2
    with pytest.raises(SystemExit) as usage:
        main(["conformance", REFERENCE, "--command", "x"])
    assert usage.value.code == 2


PROGRAM = f"{sys.executable} {ROOT / 'parity_tests/program.py'} {REFERENCE}"


def test_a_program_conforms(capsys: pytest.CaptureFixture[str]) -> None:
    """Arrays, mappings of them, options, and several results go over and come back."""
    levels = ("bias", "cache", "sampling", "seeds", "conversion")
    words = [word for level in levels for word in ("--level", level)]
    assert main(["conformance", "--command", PROGRAM, *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "alibi_spec in a program, float32 on cpu",
        f"  conforms: {', '.join(levels)}",
    ]


def test_the_exchange_in_the_readme(tmp_path: Path) -> None:
    """Its lines are what is said, but for the names of files."""
    text = README.read_text(encoding="utf-8")
    shown = [
        json.loads(line.strip()[2:])
        for line in text.splitlines()
        if line.strip()[:3] in ("> {", "< {")
    ]
    log = tmp_path / "log"
    script = tmp_path / "program.py"
    script.write_text(
        "import json, sys\n"
        "import numpy as np\n"
        "from safetensors.numpy import load_file, save_file\n"
        f"log = open({str(log)!r}, 'w')\n"
        "for line in sys.stdin:\n"
        "    request = json.loads(line)\n"
        "    answer = {'name': 'alibi-rs', 'dtype': 'float32', 'device': 'cpu'}\n"
        "    answer['functions'] = ['uniforms']\n"
        "    if request['call'] == 'uniforms':\n"
        "        load_file(request['inputs'])\n"
        "        zeros = np.zeros((5, 3), np.float32)\n"
        "        save_file({'uniforms': zeros}, request['outputs'])\n"
        "        answer = {'ok': True}\n"
        "    print(line.strip(), json.dumps(answer), sep='\\n', file=log, flush=True)\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    with Program(f"{sys.executable} {script}") as program:
        program.uniforms(seed=7, rows=3, steps=5)
    said = [json.loads(line) for line in log.read_text().splitlines()]
    assert [list(each) for each in said] == [list(each) for each in shown]
    for real, written in zip(said, shown, strict=True):
        for key, value in written.items():
            assert real[key] == value or key in ("inputs", "outputs"), key


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        (["hello"], "it answered 'hello', expected one line of a JSON object"),
        (["[1]"], "it answered '[1]', expected one line of a JSON object"),
        ([], "the program ended with exit code 3 and gave no answer"),
        (['{"error": "out of memory"}'], "raised ProgramError: out of memory"),
        (['{"fine": 1}'], "it answered {'fine': 1}, expected an ok"),
        (['{"ok": true}'], "it wrote no safetensors to"),
        (['{"refused": "no Philox"}'], "refused: no Philox"),
    ],
)
def test_programs_that_misbehave(tmp_path: Path, answers: list[str], found: str) -> None:
    """Every case fails with what was wrong; nothing waits, nothing is left running."""
    described = '{"name": "x", "functions": ["uniforms", "unknown"]}'
    with Program(_saying(tmp_path, [described, *answers])) as program:
        assert not hasattr(program, "unknown")
        result = conformance(program)
    assert found in result.outcomes[0].found
    assert not result.passed
    assert program._process.returncode is not None


@pytest.mark.parametrize("answers", [[], ["no JSON"], ['{"name": "x"}'], ['{"functions": []}']])
def test_programs_that_do_not_describe_themselves(
    tmp_path: Path, answers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conformance", "--command", _saying(tmp_path, answers)]) == 2
    assert "does not describe itself" in capsys.readouterr().err


def test_programs_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("/nowhere/program --fast", ""):
        assert main(["conformance", "--command", command]) == 2
        assert "cannot be started" in capsys.readouterr().err


def _saying(folder: Path, answers: list[str]) -> str:
    """A program that gives these answers, whatever it is asked, then ends with code 3."""
    script = folder / "program.py"
    script.write_text(
        f"import sys\nfor answer in {answers!r}:\n"
        "    sys.stdin.readline()\n    print(answer, flush=True)\n"
        "sys.stdin.readline()\nsys.exit(3)\n"
    )
    return shlex.join([sys.executable, str(script)])


def test_the_given_implementation(request: pytest.FixtureRequest) -> None:
    """`pytest --pyargs parity_tests --implementation module:factory`: one line for each failure."""
    given = request.config.getoption("--implementation")
    result: Conformance = conformance(
        made_by(given or REFERENCE, "implementation"), None if given else QUICK
    )
    failures = [f"{each.case}: {each.found}" for each in result.outcomes if each.status == "failed"]
    assert not failures, "\n".join(failures)
    assert result.passed, f"every case was refused; levels: {dict(result.levels)}"


@pytest.mark.slow
def test_pytest_runs_another_implementation() -> None:
    command = [sys.executable, "-m", "pytest", "--pyargs", "parity_tests", "-q", "--implementation"]
    for name, code in ((REFERENCE, 0), ("json:dumps", 1)):
        run = subprocess.run([*command, name], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == code, run.stdout + run.stderr
        assert f"{1 - code} passed" in run.stdout or f"{code} failed" in run.stdout


def test_the_readme_names_every_level() -> None:
    text = README.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| `(\w+)` \|", text, re.MULTILINE)
    assert rows == [(name, level.function) for name, level in LEVELS.items()]
