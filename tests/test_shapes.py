"""`@shaped` rejects what its docstring says it rejects, eagerly and under jit."""

import jax
import jax.numpy as jnp
import pytest

from lwd_jax.shapes import shaped


@shaped("z: B h w C, t: B -> B h w 1")
def mean(z, t, scale=1.0):
    return (z * t[:, None, None, None] * scale).mean(-1, keepdims=True)


def test_right_shapes_pass():
    z, t = jnp.ones((2, 3, 5, 4)), jnp.ones(2)
    assert mean(z, t).shape == jax.jit(mean)(z, t=t).shape == (2, 3, 5, 1)


@pytest.mark.parametrize(
    "z, t, words", [((2, 3, 5), (2,), "should have axes"), ((2, 3, 5, 4), (3,), "axis B of 't' is 3, but 2")]
)
def test_wrong_shapes_are_named(z, t, words):
    with pytest.raises(ValueError, match=words):
        jax.jit(mean)(jnp.ones(z), jnp.ones(t))


def test_wrong_result_is_named():
    wrong = shaped("z: B h w C -> B h w 1")(lambda z: z)
    with pytest.raises(ValueError, match="result"):
        wrong(jnp.ones((1, 2, 2, 3)))
