"""Laws: a solver follows the diffusers scheduler it names; Euler is of first order, Heun of second; one trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwd_jax.sample.schedule import sigmas
from lwd_jax.sample.solvers import SOLVERS

SCHEDULERS = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}


def foreign_trajectory(solver, z, steps, shift):
    """Every latent the diffusers scheduler passes through, for the velocity of `test_follows_diffusers`."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, SCHEDULERS[solver])(shift=shift)
    scheduler.set_timesteps(steps)
    z, seen = torch.from_numpy(np.array(z)), []
    for time in scheduler.timesteps:
        t = time / 1000
        z = scheduler.step(torch.sin(3 * z + t) + t * torch.roll(z, 1, -1), time, z).prev_sample
        seen.append(z.numpy())
    return seen


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps,shift", [(1, 3.0), (2, 1.0), (7, 3.0), (28, 6.0)])
def test_follows_diffusers(solver, steps, shift):
    z = np.random.default_rng(steps).standard_normal((2, 5, 3, 4)).astype(np.float32)
    seen = []

    def predict(z, t):
        jax.debug.callback(lambda z, t: seen.append((np.asarray(z), float(t))), z, t, ordered=True)
        return jnp.sin(3 * z + t) + t * jnp.roll(z, 1, -1)

    last = jax.jit(lambda z, levels: SOLVERS[solver](predict, z, levels))(z, sigmas(steps, shift))
    jax.effects_barrier()
    theirs = foreign_trajectory(solver, z, steps, shift)
    # Theirs recovers the velocity as (z - (z - v t)) / t, whose rounding grows as t falls to 0.001.
    tolerance = 2e-5 if solver == "euler" else 1e-4
    assert len(seen) == len(theirs) == (steps if solver == "euler" else 2 * steps - 1)
    for own, other in zip([z for z, _ in seen][1:] + [np.asarray(last)], theirs):
        np.testing.assert_allclose(own, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("solver,order", [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    """dz/dt = a z + cos(t) integrated from 1 to 0 has a closed form; halving the step divides the error by 2^order."""
    a = 1.3

    def exact(z1):
        def particular(t):
            return (np.sin(t) - a * np.cos(t)) / (1 + a * a)

        return (z1 - particular(1)) * np.exp(-a) + particular(0)

    def error(steps):
        levels = jnp.linspace(1, 0, steps + 1)
        z = SOLVERS[solver](lambda z, t: a * z + jnp.cos(t), jnp.full((1, 1, 1, 1), 0.7), levels)
        return abs(float(z.squeeze()) - exact(0.7))

    assert error(8) / error(16) == pytest.approx(2**order, rel=0.25)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_backbone_is_traced_once(solver):
    traces = []

    def predict(z, t):
        traces.append(t)
        return z * t

    jax.jit(lambda z: SOLVERS[solver](predict, z, jnp.linspace(1, 0, 9)))(jnp.ones((1, 2, 2, 1)))
    assert len(traces) == 1
