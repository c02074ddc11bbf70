"""A small stage that trains in no time: convolutions around scanned attention over the positions of a latent."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lwd_jax.config import Config, load_config
from lwd_jax.train.program import Stage

WIDTH, CHANNELS, SIDE = 16, 4, 8


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm")(x)
        q, k, v = (nn.Dense(WIDTH, use_bias=False, name=name)(y) for name in ("q", "k", "v"))
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / WIDTH**0.5)
        return x + nn.Dense(WIDTH, name="out")(weights @ v), None


class Toy(nn.Module):
    @nn.compact
    def __call__(self, x):
        b, h, w, _ = x.shape
        y = nn.Conv(WIDTH, (3, 3), name="conv_in")(x).reshape(b, h * w, WIDTH)
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        y = stack(name="blocks")(y, None)[0].reshape(b, h, w, WIDTH)
        return nn.Conv(CHANNELS, (3, 3), use_bias=False, name="conv_out")(y)


@functools.cache
def toy_params() -> dict:
    """The parameters every toy begins with, as numpy arrays (random ones would take longest of all to compile)."""
    shapes = jax.eval_shape(lambda: Toy().init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, CHANNELS)))["params"])
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (0.2 * random.normal(size=leaf.shape)).astype(np.float32), shapes)


def toy_stage(batch: int = 8, frozen: tuple[str, ...] = (), mutant: bool = False) -> Stage:
    """Removes noise that is drawn per picture. `mutant`: the first rows of the pictures are mixed up."""
    module = Toy()

    def loss(params, batch, keys):
        x = batch["x"]
        noise = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], minval=-1.0))(keys)
        if mutant:
            x = x.at[:, 0].set(jnp.roll(x[:, 0], 1, axis=0))
        per_picture = jnp.square(module.apply({"params": params}, x + noise) - x).mean((1, 2, 3)) * batch["weight"]
        half = jnp.stack([per_picture[0], per_picture[1:].sum()])
        return per_picture.mean(), {"loss_by_time": half, "count_by_time": jnp.array([1.0, len(keys) - 1.0])}

    shapes = {"x": (batch, SIDE, SIDE, CHANNELS), "weight": (batch,)}
    return Stage(
        lambda key: jax.tree.map(jnp.asarray, toy_params()),
        loss,
        {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()},
        frozen,
    )


def toy_batch(index: int, batch: int = 8) -> dict[str, np.ndarray]:
    """Batch number `index`, a pure function of it."""
    random = np.random.default_rng(index)
    x = random.normal(size=(batch, SIDE, SIDE, CHANNELS)).astype(np.float32)
    return {"x": x, "weight": random.uniform(0.5, 2, size=batch).astype(np.float32)}


class ToyBatches:
    """An endless iterator whose position is one number."""

    replaced = 0

    def __init__(self, make=toy_batch):
        self.index, self._make = 0, make

    def __next__(self):
        self.index += 1
        return self._make(self.index - 1)

    def state(self) -> dict:
        return {"index": self.index}

    def restore(self, state: dict) -> None:
        self.index = state["index"]

    def close(self) -> None:
        pass


def toy_config(**sections) -> Config:
    """A config for the toy; keyword arguments are sections or fields."""
    values = {
        "dtype": "float32",
        "remat": "none",
        "data": {"batch_size": 8},
        "optimizer": {"learning_rate": 1e-2, "warmup": 1},
        "training": {"steps": 6, "ema": 0.9, "log_every": 2, "save_every": 2, "preview_every": 0},
    }
    for name, value in sections.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return load_config(values)


def changed(config: Config, **fields) -> Config:
    """The config with top-level fields replaced."""
    return dataclasses.replace(config, **fields)
