"""Small models run with the annotations checked: every shape that the backends and the spec claim.

A module is checked by being imported under jaxtyping's hook, so test_surface.py runs `check_all` in
an interpreter of its own.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import importlib
import pkgutil
import tempfile
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, Self, get_args, get_origin

import beartype
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType
from jaxtyping import AbstractArray, TypeCheckError, install_import_hook

PACKAGES = ("alibi_spec", "alibi_torch", "alibi_flax", "alibi_train")
NOT_RUN = (
    *("alibi_torch.kernels.flash_attn.", "alibi_torch.kernels.flex."),  # they need CUDA
    "alibi_torch.transformers.",  # whose configuration cannot be made under the hook
    "alibi_spec.surface.",  # signatures alone, and so are the protocols
    "alibi_torch.kernels.windowed.operator.Passes.",
    "alibi_flax.kernels.windowed.operator.Passes.",
)

_annotated: set[str] = set()
_called: set[str] = set()


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the hook puts in front of every function: beartype, and a note of who was called."""
    name = f"{function.__module__}.{function.__qualname__}"
    if name.startswith("alibi_flax.") and function.__name__ == "__init__":
        return function  # a pytree, which JAX also makes of other leaves than arrays
    hints = {key: _without_self(hint) for key, hint in function.__annotations__.items()}
    function.__annotations__ = hints
    if any(map(_has_array, hints.values())):
        _annotated.add(name)
    check = beartype.beartype(function)

    @wraps(function)
    def noted(*args: Any, **options: Any) -> Any:
        _called.add(name)
        return check(*args, **options)

    return noted


def _without_self(hint: Any) -> Any:
    """Beartype knows `Self` only where it sees the whole class."""
    if hint is Self:
        return Any
    arguments = get_args(hint)
    return get_origin(hint)[tuple(map(_without_self, arguments))] if Self in arguments else hint


def _has_array(hint: Any) -> bool:
    is_array = isinstance(hint, type) and issubclass(hint, AbstractArray)
    return is_array or any(map(_has_array, get_args(hint)))


def check_all() -> None:
    """Import every module, run what they hold, and name what was not run."""
    jax.config.update("jax_num_cpu_devices", 2)
    _give_the_spec_its_types()
    with install_import_hook(PACKAGES, f"{__name__}.{checked.__name__}"):
        for package in map(importlib.import_module, PACKAGES):
            _import_modules_of(package)
    _run_the_spec()
    _run_models()
    _run_training()
    _read_documents()
    _run_kernels()
    _run_on_a_mesh()
    _pass_a_wrong_dtype()
    missing = {name for name in _annotated - _called if not name.startswith(NOT_RUN)}
    assert not missing, f"never called with its annotations checked: {sorted(missing)}"


def _run_on_a_mesh() -> None:
    import alibi_flax

    config = alibi_flax.ALiBiConfig(num_layers=1, d_model=8, num_heads=2, dropout=0.0)
    model = alibi_flax.ALiBiTransformer(config, implementation="blockwise", windows=((1, 1),))
    x = jnp.ones((1, 8, 8))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        jax.eval_shape(model.apply, params, x)
    _divide_positions_in_torch()


def _divide_positions_in_torch() -> None:
    """As the second of two devices; what the first one sends is not there."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import alibi_torch
    from alibi_torch.sharding import device_mesh, parallelize

    config = alibi_torch.ALiBiConfig(**SMALL, slopes=(40.0, 1.0, 0.1), num_kv_heads=3)
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    model = parallelize(alibi_torch.ALiBiLM(config), device_mesh({"sequence": 2}, "cpu"))
    model.windows = ((1, 9, -1),)
    tokens, mask = torch.tensor(TOKENS)[:, :8], torch.tensor(MASK)[:, :8]
    model(tokens, mask, segment_ids=mask).sum().backward()
    alibi_torch.loss(model, {"tokens": tokens, "targets": tokens})
    dist.destroy_process_group()


def _give_the_spec_its_types() -> None:
    """The spec imports jaxtyping for type checkers alone; here its names are built-in ones."""
    for file in (Path(__file__).parent.parent / "alibi_spec").glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                # Its own classes are not there yet: arguments of these are not checked.
                types = [each for each in node.body if "alibi_spec" not in ast.unparse(each)]
                code = compile(ast.Module(types, []), str(file), "exec")
                exec(code, {"np": np}, vars(builtins))


def _import_modules_of(package: ModuleType) -> None:
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


SMALL: dict[str, Any] = {"num_layers": 1, "d_model": 12, "num_heads": 3, "vocab_size": 11}
OPTIONS: tuple[dict[str, Any], ...] = (
    {
        **{"tie_embeddings": False, "output_projection": False, "slopes": "learned"},
        **{"norm_placement": "post", "final_norm": False, "activation": "relu"},
    },
    {"causal": False, "head": "masked_lm", "type_vocab_size": 2, "activation": "gelu_tanh"},
    {
        **{"tie_embeddings": False, "adaptive_cutoffs": (4, 7), "num_kv_heads": 1},
        **{"qk_norm": True, "qkv_clip": 1.0, "distance": "bfloat16", "norm": "rms"},
        **{"norm_bias": False, "gated_ffn": True, "activation": "silu"},
        **{"slopes": "geometric"},
    },
)
TOKENS = np.arange(18).reshape(2, 9) % 11
MASK = np.array([[1] * 9, [0] * 4 + [1] * 5])
SAMPLING: dict[str, Any] = {
    **{"do_sample": True, "temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
    "repetition_penalty": 1.2,
}


def _run_models() -> None:
    import alibi_flax
    import alibi_torch
    from alibi_convert import torch_to_flax
    from alibi_spec import ALiBiConfig

    for options in OPTIONS:
        config = ALiBiConfig(**SMALL, **options)
        ours, theirs = alibi_torch.ALiBiLM(config), alibi_flax.ALiBiLM(config)
        params = torch_to_flax(ours.state_dict(), config)
        ours(torch.tensor(TOKENS), torch.tensor(MASK)).sum().backward()
        train = partial(theirs.apply, deterministic=False, rngs={"dropout": jax.random.key(1)})
        arrays = jnp.asarray(TOKENS), jnp.asarray(MASK)
        jax.eval_shape(train, {"params": params}, *arrays)
        jax.eval_shape(partial(alibi_flax.trace, theirs), params, *arrays)
        with torch.no_grad():
            alibi_torch.trace(ours.eval(), torch.tensor(TOKENS), torch.tensor(MASK))
            if config.distance != "bfloat16":
                alibi_torch.model_plans(ours, torch.tensor(TOKENS), torch.tensor(MASK))
                jax.eval_shape(partial(alibi_flax.model_plans, theirs), params, *arrays)
            _call_functions(alibi_torch, (ours,), torch.tensor, SAMPLING)
        if config.adaptive_cutoffs is None:  # once each: it must be compiled
            _call_functions(alibi_flax, (theirs, params), jnp.asarray, {})
    _trace_drawing()
    _run_rings()


def _run_training() -> None:
    """A step and an evaluation of both backends, and all that the specification says of them."""
    import alibi_flax
    import alibi_torch
    from alibi_convert import torch_to_flax
    from alibi_spec import ALiBiConfig, masked_lm_batch, next_token_targets, training

    config = ALiBiConfig(**SMALL, slopes="learned")
    recipe = training.Recipe(steps=1, batch_size=2, compute_dtype="bfloat16")
    batch = {"tokens": TOKENS, "targets": next_token_targets(TOKENS, MASK, MASK)}
    model = alibi_torch.ALiBiLM(config)
    params = torch_to_flax(model.state_dict(), config)
    trainer = alibi_torch.Trainer(model, recipe)
    trainer.step(batch)
    trainer.evaluate(batch | {"segment_ids": MASK})
    other = alibi_flax.Trainer(alibi_flax.ALiBiLM(config), params, recipe)
    step = partial(alibi_flax.train_step, other.model, other.optimizer, recipe=recipe)
    jax.eval_shape(step, other.params, other.optimizer_state, batch)
    other.evaluate(batch | {"segment_ids": MASK})
    masked_lm_batch(TOKENS, 3, 11, seed=0, attention_mask=MASK)
    training.negative_log_likelihood(np.zeros((2, 9, 11)), batch["targets"])


def _run_rings() -> None:
    """Caches from which keys have gone, and a long one of which a call reads a part."""
    import alibi_flax
    import alibi_torch
    from alibi_convert import torch_to_flax
    from alibi_spec import ALiBiConfig

    config = ALiBiConfig(**SMALL, slopes=(4.0, 6.0, 5.0))
    ours, theirs = alibi_torch.ALiBiLM(config).eval(), alibi_flax.ALiBiLM(config)
    params = torch_to_flax(ours.state_dict(), config)
    windows, tokens = np.array([[16, 20, 16]]), np.zeros((2, 40), int)
    with torch.no_grad():
        if torch.backends.mkldnn.is_available():
            alibi_torch.linear.by_onednn(torch.ones(2, 3), torch.ones(4, 3), None, None)
        else:  # nothing calls it
            _called.add("alibi_torch.linear.by_onednn")
        for options in ({"windows": windows}, {}):
            cache = alibi_torch.KVCache.empty(config, 2, 9000, **options)
            cache = dataclasses.replace(cache, length=0 if options else 8192)
            for part in (slice(0, 30), slice(30, 31), slice(31, 40)):
                _, cache = ours(torch.tensor(tokens[:, part]), cache=cache)

    def read(params: Any, tokens: Any) -> Any:
        cache = alibi_flax.KVCache.empty(config, 2, None, windows=windows)
        for part in (slice(0, 30), slice(30, 31)):
            logits, cache = theirs.apply({"params": params}, tokens[:, part], cache=cache)
        return logits

    jax.eval_shape(read, params, jnp.asarray(tokens))


def _trace_drawing() -> None:
    from alibi_flax.sampling import chosen_tokens
    from alibi_spec.sampling import Sampling

    logits = jnp.ones((2, 11))
    jax.eval_shape(
        lambda *x: chosen_tokens(*x, Sampling(**SAMPLING)), logits, logits > 0, logits[:, 0]
    )


def _call_functions(
    backend: Any, model: tuple[Any, ...], array: Callable[..., Any], sampling: dict[str, Any]
) -> None:
    """What applications call."""
    config, tokens, mask = model[0].config, array(TOKENS), array(MASK)
    if not config.causal:
        backend.fill_masks(*model, tokens, 3, attention_mask=mask)
        backend.encode(*model, [[1, 2], [3]])
        return
    backend.token_log_probabilities(*model, tokens, mask)
    options = sampling | {"attention_mask": mask}
    list(backend.stream(*model, tokens, 2, **options))
    backend.generate(*model, tokens, 2, **options, return_log_probabilities=True)


def _run_the_spec() -> None:
    from alibi_spec import ALiBiConfig, budgets, parameter_table, reference_forward
    from alibi_spec.bounds import model_windows
    from alibi_spec.cache import Cache
    from alibi_spec.exact import exact_attention
    from alibi_spec.filling import likeliest
    from alibi_spec.pooling import pooled

    rng = np.random.default_rng(0)
    for options in ({}, *OPTIONS):
        config = ALiBiConfig(**SMALL, **options)
        parameters = {row.name: rng.standard_normal(row.shape) for row in parameter_table(config)}
        trace = reference_forward(config, parameters, TOKENS, MASK)
        model_windows(config, parameters)
        if config.causal:
            cache = Cache.empty(config, 2).extended(trace, MASK)
            reference_forward(config, parameters, TOKENS, cache=cache)
    exact_attention(ALiBiConfig(**SMALL), 2, 8)
    pooled(trace["output"], MASK > 0)
    likeliest(trace["logits"][0], 3)
    budgets.activation_errors(config, trace, trace)
    budgets.relative_error(trace["output"], trace["output"])
    budgets.gradient_floor(parameters)
    _draw_by_the_spec(trace["logits"][:, 0])
    _plan_by_the_spec()


def _draw_by_the_spec(logits: np.ndarray) -> None:
    from alibi_spec import dropout
    from alibi_spec.sampling import Sampling, boundary_distance, drawn_tokens, processed, uniforms

    uniform = next(uniforms(0, len(logits)))
    kept = processed(logits, logits > 0, Sampling(**SAMPLING))
    drawn_tokens(kept, uniform)
    boundary_distance(kept, uniform)
    hashes = dropout.query_hashes(np.array([1, 2]), 2, 3, 4)
    dropout.is_kept(hashes, dropout.key_hashes(5), 0.1)


def _plan_by_the_spec() -> None:
    from alibi_spec.certificate import attention_plan, dropped_mass, keys_needed

    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 4, 3, 8)), rng.standard_normal((2, 2, 5, 8))
    plan = attention_plan(query, key, np.ones(4), block_size=2)
    dropped_mass(plan, query, key, np.ones(4))
    keys_needed(query, key[:, :, :3], np.ones((2, 2)), np.ones(4))


def _read_documents() -> None:
    from alibi_spec import ALiBiConfig
    from alibi_spec.parameters import initial_parameters
    from alibi_train.batches import Batches, Rows
    from alibi_train.documents import files_of, read_documents

    initial_parameters(ALiBiConfig(**SMALL, slopes="learned"), seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.txt").write_text("one text")
        np.save(folder / "b.npy", np.arange(30))
        texts = read_documents(files_of(["*.txt"], folder), None, 0, "uint16")
        tokens = read_documents([folder / "b.npy"], None, 7, "uint16")
    for documents, mask in ((texts, None), (tokens, 3)):
        rows = Rows(documents, 4, 256, has_next=mask is None)
        next(Batches(rows, 1, 0, mask).in_order(1))


LENGTH = 300
MASKED = {"attention_mask": np.arange(LENGTH) > 70, "segment_ids": np.arange(LENGTH) // 90}


def _run_kernels() -> None:
    """Of torch, whatever a CPU computes; of JAX, traced for whatever device."""
    import alibi_torch

    masks = {name: torch.tensor(row).expand(2, -1) for name, row in MASKED.items()}
    query, slopes = torch.randn(2, 4, LENGTH, 8).requires_grad_(), torch.ones(4)
    key = torch.full((2, 2, LENGTH, 8), torch.nan)
    for implementation, its_slopes, options in (
        ("aten_flash", slopes, {}),
        ("aten_flash", slopes, masks),
        ("blockwise", slopes.clone().requires_grad_(), {"dropout": 0.1}),
        ("blockwise", slopes, masks | {"causal": False}),
    ):
        attention = partial(alibi_torch.attention, implementation=implementation, **options)
        attention(query, key, key, its_slopes).sum().backward()
    _trace_kernels_of_jax()


def _trace_kernels_of_jax() -> None:
    import alibi_flax
    from alibi_flax.kernels.call import Call
    from alibi_flax.kernels.dropout import drawn_dropout
    from alibi_flax.kernels.windowed import operator, pallas_gpu, pallas_tpu, xla_loops

    def total(passes: Any, query: Any, key: Any, slopes: Any, rng: Any, masks: Any) -> Any:
        dropout = drawn_dropout(0.1, rng, query, 0, LENGTH)
        call = Call(query, key, key, slopes, True, 1.0, 0, *masks, "dtype", "absolute", dropout)
        return operator.attention(call, passes, None if passes is pallas_gpu else 128).sum()

    query, key = jnp.ones((2, 4, LENGTH, 64)), jnp.ones((2, 2, LENGTH, 64))
    masks = [jnp.broadcast_to(row, (2, LENGTH)) for row in MASKED.values()]
    jax.eval_shape(alibi_flax.attention, *[query.swapaxes(1, 2)] * 3, jnp.ones(4))
    for passes in (xla_loops, pallas_tpu, pallas_gpu):
        gradients = jax.grad(partial(total, passes), argnums=(0, 1, 2))
        jax.eval_shape(gradients, query, key, jnp.ones(4), jax.random.key(0), masks)


def _pass_a_wrong_dtype() -> None:
    import alibi_torch

    query, key = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)
    with pytest.raises(TypeCheckError, match="slopes"):
        alibi_torch.attention(query, key, key, torch.zeros(2, dtype=torch.int64))
