"""Solvers of the probability-flow ODE dz/dt = velocity(z, t), from t = 1 (noise) to t = 0 (data).

A solver is `f(predict, z, sigmas) -> z0` with `predict(z, t) -> velocity`, t a float32 scalar. Both run as one
`lax.scan`, so that a backbone is compiled once whatever the number of steps.
"""

import jax
import jax.numpy as jnp


def euler(predict, z, sigmas):
    """z <- z + (t' - t) v: FlowMatchEulerDiscreteScheduler.

    Args:
      predict: (z, t) -> velocity, the shape of z.
      z: noise, float32.
      sigmas: [steps + 1] falling noise levels, last 0.

    Returns:
      The latent at the last level.
    """

    def step(z, level):
        t, dt = level
        return z + dt * predict(z, t), None

    return jax.lax.scan(step, z, (sigmas[:-1], jnp.diff(sigmas)))[0]


def heun(predict, z, sigmas):
    """Heun's second-order method with a last Euler step, as FlowMatchHeunDiscreteScheduler does it.

    2 steps - 1 evaluations: every interval but the last is corrected with the mean of the velocities at both of its
    ends (EDM, arXiv 2206.00364, algorithm 1). The scan runs over evaluations, not steps, so `predict` is traced once.

    Args, Returns: as `euler`.
    """
    corrects = jnp.arange(2 * len(sigmas) - 3) % 2 == 1  # predictor, corrector, predictor, ..., last predictor
    intervals = jnp.arange(2 * len(sigmas) - 3) // 2
    times = jnp.where(corrects, sigmas[intervals + 1], sigmas[intervals])

    def evaluate(carry, now):
        start, first, z = carry
        t, dt, correct = now
        v = predict(z, t)
        z = start + dt * jnp.where(correct, (first + v) / 2, v)
        return (jnp.where(correct, z, start), v, z), None

    carry = (z, jnp.zeros_like(z), z)
    return jax.lax.scan(evaluate, carry, (times, jnp.diff(sigmas)[intervals], corrects))[0][2]


SOLVERS = {"euler": euler, "heun": heun}
SCHEDULERS = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}  # diffusers' names
