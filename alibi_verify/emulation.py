"""What other devices make of products of float32 matrices, emulated on the CPU.

TPUs multiply bfloat16 numbers, recent GPUs of NVIDIA TF32 ones, and add in float32. A float32
factor is rounded to one such number; or split into several, whose products are computed one by one.
JAX has these algorithms by name, but on CPUs it computes float32 whatever is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Algorithm:
    """How products of float32 matrices are computed.

    Attributes:
        bits: significant bits of each part of a factor; None leaves the factors as they are.
        passes: which part of the left factor meets which part of the right one, the smallest
            products first. Parts are counted from the largest.
    """

    bits: int | None
    passes: tuple[tuple[int, int], ...] = ((0, 0),)


ALGORITHMS: Mapping[str, Algorithm] = {
    "float32": Algorithm(None),
    "bfloat16, 6 passes": Algorithm(8, ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0))),
    "bfloat16, 3 passes": Algorithm(8, ((1, 0), (0, 1), (0, 0))),
    "TF32": Algorithm(11),
    "bfloat16, 1 pass": Algorithm(8),
}

# Equations that only call a program, and the option that holds it.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}


def emulated(
    function: Callable[..., Any], default: str, highest: str = "float32"
) -> Callable[..., Any]:
    """A function of JAX arrays with its products of float32 matrices computed as a device does.

    Args:
        function: what `jax.jit` takes.
        default: the name in `ALGORITHMS` of how products are computed that ask for nothing.
        highest: the same of products that ask for the highest precision.

    Raises:
        ValueError: a loop or a kernel holds such products: they would escape.
    """
    import jax

    algorithms = ALGORITHMS[default], ALGORITHMS[highest]

    def run(*arguments: Any) -> Any:
        program, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
        found = _evaluated(program, jax.tree.leaves(arguments), algorithms)
        return jax.tree.unflatten(jax.tree.structure(result), found)

    return jax.jit(run)


def _evaluated(
    program: Any, arguments: Sequence[Any], algorithms: tuple[Algorithm, Algorithm]
) -> list[Any]:
    """What a closed jaxpr computes: each equation as it is, but for products."""
    from jax.extend.core import Literal

    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.constvars, program.consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(names: Sequence[Any]) -> list[Any]:
        return [each.val if isinstance(each, Literal) else values[each] for each in names]

    for equation in jaxpr.eqns:
        given, options = read(equation.invars), equation.params
        if _is_product(equation):
            found = [_product(given[0], given[1], options, algorithms)]
        elif equation.primitive.name in _CALLS:
            found = _evaluated(options[_CALLS[equation.primitive.name]], given, algorithms)
        elif any(map(_has_products, options.values())):
            raise ValueError(
                f"products in a {equation.primitive.name} would escape the emulation; expected "
                'none but in plain calls: compute attention with implementation="dense"'
            )
        else:
            made = equation.primitive.bind(*given, **options)
            found = made if equation.primitive.multiple_results else [made]
        values |= dict(zip(equation.outvars, found, strict=True))
    return read(jaxpr.outvars)


def _is_product(equation: Any) -> bool:
    dtypes = {str(each.aval.dtype) for each in equation.invars}
    return equation.primitive.name == "dot_general" and dtypes == {"float32"}


def _has_products(option: Any) -> bool:
    """Whether an option of an equation is a program, or several, with products."""
    if isinstance(option, tuple | list):
        return any(map(_has_products, option))
    jaxpr = getattr(option, "jaxpr", option)
    return any(
        _is_product(each) or any(map(_has_products, each.params.values()))
        for each in getattr(jaxpr, "eqns", ())
    )


def _product(
    left: Any, right: Any, options: dict[str, Any], algorithms: tuple[Algorithm, Algorithm]
) -> Any:
    import jax

    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    algorithm = algorithms[options["precision"] == highest]
    lefts, rights = _parts(left, algorithm), _parts(right, algorithm)
    products = [
        jax.lax.dot_general_p.bind(lefts[i], rights[j], **options) for i, j in algorithm.passes
    ]
    return sum(products[1:], start=products[0])


def _parts(x: Any, algorithm: Algorithm) -> list[Any]:
    """The parts of a factor that its passes need, the largest first; their sum is nearest to it."""
    import jax

    if algorithm.bits is None:
        return [x]
    parts = []
    for _ in range(1 + max(map(max, algorithm.passes))):
        parts.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=algorithm.bits - 1))
        x = x - parts[-1]
    return parts
