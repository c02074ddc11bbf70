"""Laws: the settings of every optimizer mean what they mean in its paper; the updates are written out in numpy."""

import jax
import numpy as np
import optax
import pytest

from lwd_jax import config as configs
from lwd_jax.train.optimizer import make_optimizer
from lwd_jax.weights.table import flat, nested

# No two are alike and none is a default, eps not too small to be seen.
B1, B2, EPS, RATE, DECAY = 0.7, 0.8, 0.05, 0.1, 0.25
WARMUP = 2
RATES = [RATE / 2, RATE, RATE, RATE]


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


START, GRADIENTS = drawn(6, 9), drawn(len(RATES), 6, 9, seed=1)


def trained(name, params, gradients, **values):
    """Parameters by path after a step with each of the gradients by path."""
    given = {"learning_rate": RATE, "b1": B1, "b2": B2, "eps": EPS, "weight_decay": DECAY, "warmup": WARMUP} | values
    optimizer = make_optimizer(configs.Optimizer(name=name, **given), 100)
    params = nested(params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for number in range(len(next(iter(gradients.values())))):
        now = nested({path: gradient[number] for path, gradient in gradients.items()})
        updates, state = update(now, state, params)
        params = optax.apply_updates(params, updates)
    return {path: np.asarray(leaf) for path, leaf in flat(params).items()}


def nesterov(m, g, k):
    """Nesterov's momentum: as it will be in the next step, as far as this gradient says."""
    return B1 * m / (1 - B1 ** (k + 1)) + (1 - B1) * g / (1 - B1**k)


def adamw(w, gradients, decay=DECAY, momentum=lambda m, g, k: m / (1 - B1**k)):
    m = v = 0
    for k, (g, rate) in enumerate(zip(gradients, RATES), start=1):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        w = w - rate * (momentum(m, g, k) / (np.sqrt(v / (1 - B2**k)) + EPS) + decay * w)
    return w


def lion(w, gradients):
    """arXiv 2302.06675, Algorithm 2."""
    m = 0
    for g, rate in zip(gradients, RATES):
        w, m = w - rate * (np.sign(B1 * m + (1 - B1) * g) + DECAY * w), B2 * m + (1 - B2) * g
    return w


def schedule_free(w, gradients):
    """arXiv 2405.15682, Algorithm 1: the gradient is taken at y, z runs, x is the average by squared rates."""
    x = y = z = w
    v = total = 0
    for k, (g, rate) in enumerate(zip(gradients, RATES), start=1):
        v = B2 * v + (1 - B2) * g**2
        z = z - rate * (g / (np.sqrt(v / (1 - B2**k)) + EPS) + DECAY * y)
        total += rate**2
        x = x + rate**2 / total * (z - x)
        y = B1 * x + (1 - B1) * z
    return y


FORMULAS = {"adamw": adamw, "lion": lion, "schedule_free_adamw": schedule_free}


@pytest.mark.parametrize("name", FORMULAS)
def test_updates_are_their_formula(name):
    found = trained(name, {"kernel": START}, {"kernel": GRADIENTS})["kernel"]
    np.testing.assert_allclose(found, FORMULAS[name](START, GRADIENTS), rtol=2e-5, atol=2e-6)


def orthogonal(matrix):
    """Five steps of the quintic iteration of Newton and Schulz."""
    x = matrix / (np.linalg.norm(matrix) + EPS)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def muon(w, gradients):
    """In the size of Adam's updates (arXiv 2502.16982, eq. 4)."""
    m = 0
    for k, (g, rate) in enumerate(zip(gradients, RATES), start=1):
        m = B1 * m + (1 - B1) * g
        w = w - rate * (0.2 * np.sqrt(max(w.shape)) * orthogonal(nesterov(m, g, k)) + DECAY * w)
    return w


def test_muon_is_of_the_matrix_of_all_inputs_and_adam_of_what_is_none():
    """A convolution's inputs are those of its whole window; layers of a stack are matrices of their own."""
    shapes = {"q/kernel": (6, 9), "conv_in/kernel": (3, 3, 2, 5), "blocks/v/kernel": (2, 7, 4), "q/bias": (9,)}
    params = {path: drawn(*shape, seed=2) for path, shape in shapes.items()}
    gradients = {path: drawn(len(RATES), *shape, seed=3) for path, shape in shapes.items()}
    found = trained("muon", params, gradients)

    def of_matrices(path, *shape):
        w, g = params[path].reshape(-1, *shape), gradients[path].reshape(len(RATES), -1, *shape)
        return np.stack([muon(w[layer], g[:, layer]) for layer in range(len(w))]).reshape(shapes[path])

    expected = {
        "q/kernel": of_matrices("q/kernel", 6, 9),
        "conv_in/kernel": of_matrices("conv_in/kernel", 18, 5),
        "blocks/v/kernel": of_matrices("blocks/v/kernel", 7, 4),
        "q/bias": adamw(params["q/bias"], gradients["q/bias"], decay=0, momentum=nesterov),
    }
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)


def test_prodigy_does_not_let_the_warm_up_into_its_estimate():
    """Against optax's own: of a warm-up it would take small steps for short distances, and find too large a rate."""
    gradients = np.repeat(GRADIENTS[:1], 12, axis=0)  # downhill all the way, so that the estimate grows
    values = {"learning_rate": 1.0, "weight_decay": 0.0, "warmup": 4}
    found = trained("prodigy", {"kernel": START}, {"kernel": gradients}, **values)["kernel"]

    def moved(safeguard):
        schedule = optax.linear_schedule(1 / 4, 1.0, 3)
        own = optax.contrib.prodigy(schedule, betas=(B1, B2), eps=EPS, safeguard_warmup=safeguard)
        params, state = START, own.init(START)
        for gradient in gradients:
            updates, state = jax.jit(own.update)(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return np.asarray(params) - START

    np.testing.assert_allclose(found - START, moved(True), rtol=1e-3, atol=1e-6)
    assert np.abs(moved(False) - moved(True)).max() > 0.1 * np.abs(moved(True)).max()


def test_adafactors_first_step_does_not_know_the_size_of_the_weight():
    """Its rate is absolute, not relative to the parameter as in its paper."""
    moved = [
        trained("adafactor", {"kernel": size * START}, {"kernel": GRADIENTS[:1]}, weight_decay=0.0)["kernel"]
        - size * START
        for size in (0.01, 1.0)
    ]
    np.testing.assert_allclose(*moved, atol=1e-5)
    assert np.abs(moved[0]).max() > 0.1 * RATES[0]
