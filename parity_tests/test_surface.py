"""Both backends offer the same public names and signatures, and neither imports the other."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
import textwrap
from operator import attrgetter
from types import ModuleType

import pytest

import alibi_convert
import alibi_flax
import alibi_spec
import alibi_torch
import alibi_train
import alibi_verify
from alibi_spec import surface

FUNCTIONS = (
    *("attention", "attention_implementations", "attention_plan", "biased_logits"),
    "full_precision",
)


@pytest.mark.parametrize("backend", [alibi_torch, alibi_flax], ids=["torch", "flax"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_signatures(backend: object, function: str) -> None:
    assert _parameters(getattr(backend, function)) == _parameters(getattr(surface, function))


@pytest.mark.parametrize(
    "function",
    [
        *("encode", "fill_masks", "generate", "model_plans", "stream"),
        *("token_log_probabilities", "trace"),
    ],
)
def test_flax_adds_params_alone(function: str) -> None:
    """Linen keeps parameters outside the module: they follow it in every signature."""
    ours, theirs = (_parameters(getattr(each, function)) for each in (alibi_torch, alibi_flax))
    assert ours == _parameters(getattr(surface, function))
    assert theirs == [ours[0], ("params", ours[0][1], inspect.Parameter.empty), *ours[1:]]


@pytest.mark.parametrize(
    ("function", "added"),
    [
        ("loss", ["params", "dropout_rng"]),
        ("train_step", ["params", "optimizer_state"]),
        ("Trainer", ["params"]),
        ("Trainer.step", []),
        ("Trainer.evaluate", []),
    ],
)
def test_flax_adds_its_state_to_training(function: str, added: list[str]) -> None:
    ours, theirs, expected = (
        attrgetter(function)(each) for each in (alibi_torch, alibi_flax, surface)
    )
    assert _parameters(ours) == _parameters(expected)
    assert _without(theirs, *added) == _parameters(expected)
    assert [each[0] for each in _parameters(theirs) if each[0] in added] == added


@pytest.mark.parametrize(
    ("function", "first"),
    [("adamw", ["model", "config"]), ("clip_gradients", ["parameters", "gradients"])],
)
def test_torch_begins_with_what_holds_parameters(function: str, first: list[str]) -> None:
    ours, theirs = (_parameters(getattr(each, function)) for each in (alibi_torch, alibi_flax))
    assert ours == _parameters(getattr(surface, function))
    assert theirs[1:] == ours[1:]
    assert [ours[0][0], theirs[0][0]] == first


@pytest.mark.parametrize("model", ["ALiBiTransformer", "ALiBiLM"])
def test_models_are_called_alike(model: str) -> None:
    """What each framework adds is its own: `deterministic`, scans; devices, meshes; params."""
    ours, theirs = (getattr(each, model) for each in (alibi_torch, alibi_flax))
    expected = [each for each in _parameters(theirs.__call__) if each[0] != "deterministic"]
    assert _parameters(ours.forward) == expected
    assert _without(ours.from_pretrained, "device", "mesh", "rules") == _without(
        alibi_flax.from_pretrained, "sharding", "scan_layers"
    )
    saved = _without(alibi_flax.save_pretrained, "model", "params")
    assert _without(ours.save_pretrained, "self") == saved


@pytest.mark.parametrize("backend", [alibi_torch, alibi_flax], ids=["torch", "flax"])
def test_public_names(backend: object) -> None:
    assert set(surface.PUBLIC) <= set(backend.__all__)
    assert all(hasattr(backend, name) for name in backend.__all__)


@pytest.mark.parametrize(
    "package",
    [alibi_spec, alibi_convert, alibi_torch, alibi_flax, alibi_verify, alibi_train],
    ids=lambda package: package.__name__,
)
def test_no_module_shadows_a_public_name(package: ModuleType) -> None:
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert modules.isdisjoint(package.__all__)


def test_public_functions_are_documented() -> None:
    for backend in (alibi_torch, alibi_flax):
        for name in backend.__all__:
            assert getattr(backend, name).__doc__, f"{backend.__name__}.{name}"


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("alibi_spec", ("torch", "jax", "flax", "safetensors", "einops", "jaxtyping")),
        ("alibi_convert", ("torch", "jax", "flax", "alibi_torch", "alibi_flax", "alibi_verify")),
        ("alibi_torch", ("jax", "flax", "optax", "alibi_flax", "alibi_verify")),
        ("alibi_flax", ("torch", "alibi_torch", "alibi_verify")),
        ("alibi_verify", ("torch", "jax", "flax", "alibi_torch", "alibi_flax", "alibi_cli")),
        ("alibi_train", ("torch", "jax", "flax", "alibi_torch", "alibi_flax", "alibi_verify")),
    ],
)
def test_walls(package: str, forbidden: tuple[str, ...]) -> None:
    """Importing one package imports nothing that it must not know, even where all is installed."""
    _run(f"""
        import sys
        import {package}
        crossed = [name for name in {forbidden!r} if name in sys.modules]
        assert not crossed, crossed
    """)


@pytest.mark.parametrize(
    ("package", "missing"),
    [("alibi_torch", ("jax", "flax")), ("alibi_flax", ("torch",))],
)
def test_a_backend_works_where_the_other_is_not_installed(
    package: str, missing: tuple[str, ...]
) -> None:
    """A checkpoint goes out and in again without the other framework."""
    save_and_load = {
        "alibi_torch": """
            model = alibi_torch.ALiBiLM(config)
            model.save_pretrained(folder)
            alibi_torch.ALiBiLM.from_pretrained(folder)
        """,
        "alibi_flax": """
            import jax
            model = alibi_flax.ALiBiLM(config)
            tokens = jax.numpy.zeros((1, 3), int)
            params = model.init(jax.random.key(0), tokens)["params"]
            alibi_flax.save_pretrained(folder, model, params)
            alibi_flax.from_pretrained(folder)
        """,
    }[package]
    _run(f"""
        import sys, tempfile
        class NotInstalled:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {missing!r}:
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, NotInstalled())
        import {package}
        config = {package}.ALiBiConfig(num_layers=1, d_model=8, num_heads=2, vocab_size=5)
        folder = tempfile.mkdtemp() + "/model"
        {textwrap.dedent(save_and_load).strip().replace(chr(10), chr(10) + "        ")}
    """)


def test_verify_says_which_backend_is_missing(tmp_path: object) -> None:
    _run(f"""
        import importlib.util
        from alibi_verify import verify
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name: None if name == "flax" else find_spec(name)
        try:
            verify({str(tmp_path)!r})
        except ValueError as error:
            assert "pip install 'alibi-duo[flax]'" in str(error), error
        else:
            raise SystemExit("no error")
    """)


def test_importing_torchs_wing_does_no_work() -> None:
    """No operator runs, no thread begins, nothing is left to be done at a fork or at the end."""
    _run("""
        import atexit, os, threading
        import einops, torch, torch.nn.attention.flex_attention
        from torch.utils._python_dispatch import TorchDispatchMode
        work = []
        class Watched(TorchDispatchMode):
            def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
                work.append(str(operator))
                return operator(*args, **(kwargs or {}))
        atexit.register = lambda *arguments, **_: work.append(f"at exit: {arguments}")
        os.register_at_fork = lambda **hooks: work.append(f"at fork: {hooks}")
        threading.Thread.start = lambda thread: work.append(f"a thread: {thread}")
        with Watched():
            import alibi_torch
        assert not work, work
    """)


def test_importing_flaxs_wing_does_no_work() -> None:
    """No array is made: JAX has not even looked for its devices."""
    _run("""
        import alibi_flax
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
    """)


def test_annotated_shapes_hold() -> None:
    """Every jaxtyping annotation of both backends and the spec, checked at run time."""
    _run("from parity_tests.annotations import check_all; check_all()")


def _parameters(function: object) -> list[tuple[str, object, object]]:
    parameters = inspect.signature(function).parameters.values()
    return [(each.name, each.kind, each.default) for each in parameters]


def _without(function: object, *names: str) -> list[tuple[str, object, object]]:
    return [each for each in _parameters(function) if each[0] not in names]


def _run(code: str) -> None:
    """Run code in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:alibi", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
