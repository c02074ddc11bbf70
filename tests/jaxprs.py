"""What a traced program is made of, found without compiling or running it."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

PRODUCTS = ("dot_general", "conv_general_dilated")


def equations(jaxpr) -> Iterator:
    """Every equation of a jaxpr and of all jaxprs inside it (scans, conditionals, remat, custom rules)."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(parameter, "eqns") or hasattr(parameter, "jaxpr"):
                yield from equations(parameter)


def traced(function, *args) -> list:
    """The equations of `function(*args)`; the arguments may be ShapeDtypeStructs."""
    return list(equations(jax.make_jaxpr(function)(*args)))


def shapes(found) -> set[tuple[int, ...]]:
    """Of all that the equations read and make."""
    return {tuple(v.aval.shape) for e in found for v in (*e.invars, *e.outvars) if hasattr(v.aval, "shape")}


def rounded(found) -> list[str]:
    """The products of float32 operands that are not computed in full precision."""
    full = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    products = [e for e in found if e.primitive.name in PRODUCTS]
    assert products, "a program without products says nothing"
    return [
        str(e.source_info.name_stack) + str([v.aval.str_short() for v in e.invars])
        for e in products
        if all(v.aval.dtype == jnp.float32 for v in e.invars) and e.params["precision"] != full
    ]
