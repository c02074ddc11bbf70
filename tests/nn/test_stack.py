"""A block called in turn computes the same, and its weights' gradients are ready before any of what it was given. A
stack computes the same on every platform, as a loop or without one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lwd_jax.nn.platform import for_platform
from lwd_jax.nn.stack import REMAT, adapted, in_turn, rematerialised, stacked


class Block(nn.Module):
    @nn.compact
    def __call__(self, tokens, emb, real):
        picture, text = tokens
        text = text if real is None else text * real[..., None]
        return nn.Dense(6)(jnp.tanh(picture) * emb) + nn.Dense(6)(text).sum(1, keepdims=True)


class Model(nn.Module):
    settled: bool

    @nn.compact
    def __call__(self, tokens, emb, real):
        last = rematerialised(Block, "full")(name="last")
        return (in_turn(last) if self.settled else last)((nn.Dense(4, name="first")(tokens[0]), tokens[1]), emb, real)


def given(masked):
    random = np.random.default_rng(0)
    tokens = random.normal(size=(2, 5, 3)).astype(np.float32), random.normal(size=(2, 3, 4)).astype(np.float32)
    return tokens, random.normal(size=(2, 1, 4)).astype(np.float32), np.arange(6).reshape(2, 3) < 4 if masked else None


def loss(settled):
    return lambda params, *args: jnp.square(Model(settled).apply({"params": params}, *args)).sum()


def test_nothing_is_computed_differently():
    for masked in (False, True):
        tokens, emb, real = given(masked)
        params = jax.jit(Model(False).init)(jax.random.key(1), tokens, emb, real)["params"]
        settled = jax.eval_shape(Model(True).init, jax.random.key(1), tokens, emb, real)["params"]
        assert jax.tree.structure(params) == jax.tree.structure(settled)
        made, expected = (
            jax.jit(jax.value_and_grad(loss(kind), (0, 1, 2)))(params, tokens, emb, real) for kind in (True, False)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), made, expected)


def test_the_weights_gradients_do_not_wait():
    """What comes before the block is differentiated with what a barrier over all of the block's gradients gives out."""
    params = jax.eval_shape(Model(True).init, jax.random.key(1), *given(False))["params"]
    traced = jax.make_jaxpr(jax.grad(loss(True)))(params, *given(False))
    barriers = [e for e in traced.eqns if e.primitive.name == "optimization_barrier"]
    assert len(barriers) == 1
    shapes = [v.aval.shape for v in barriers[0].outvars]
    for leaf in jax.tree.leaves(params["last"]) + [np.zeros((2, 5, 4))]:
        assert leaf.shape in shapes
    after = traced.eqns[traced.eqns.index(barriers[0]) + 1 :]
    first = [v for v, path in zip(traced.jaxpr.outvars, jax.tree.leaves_with_path(params)) if "first" in str(path[0])]
    assert len(first) == 2 and set(first) <= {v for e in after for v in e.outvars}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, shift):
        return x + jnp.tanh(nn.Dense(x.shape[-1])(x) + shift), None


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("remat", REMAT)
def test_a_stack_is_a_loop_but_on_a_cpu_without_remat(remat, adapters):
    """With the same keys, values and gradients; there XLA:CPU is given no loop, whose weights it would copy, unless
    they are frozen."""
    random = np.random.default_rng(2)
    given = random.normal(size=(2, 5, 7)).astype(np.float32), random.normal(size=7).astype(np.float32)
    made = {}
    for platform in ("cpu", "gpu", "tpu"):
        with for_platform(platform):
            module = stacked(Layer, 3, remat, adapters=adapters)()
            params = jax.jit(module.init)(jax.random.key(3), *given)["params"]

            def loss(params, x, shift, module=module):
                return jnp.square(module.apply({"params": params}, x, shift)[0]).sum()

            compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(params, *given).compile()
        assert (" while(" in compiled.as_text()) == (platform != "cpu" or remat != "none" or adapters)
        made[platform] = params, compiled(params, *given)
    assert jax.tree.leaves(made["cpu"][0])[0].shape[0] == 3
    for platform in ("gpu", "tpu"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), made["cpu"], made[platform])


def test_a_model_with_adapters_is_known_by_its_parameters():
    plain = {"first": {"kernel": np.ones((3, 4))}, "last": {"Dense_0": {"kernel": np.ones((4, 6))}}}
    lora = {**plain, "last": {"Dense_0": {"kernel": np.ones((4, 6)), "lora_scale": np.ones(())}}}
    joined = {**plain, "first": {"kernel": np.ones((3, 4)), "fixed_a": np.ones((3, 2))}}
    assert [adapted(Model(True).bind({"params": params})) for params in (plain, lora, joined)] == [False, True, True]
