"""Laws: batches lie on the devices before they are asked for, split as the step takes them; the position is that of
what was used.
"""

import time

import jax
import numpy as np
import pytest
from toy_stage import ToyBatches, toy_batch

from lwd_jax import config as configs
from lwd_jax.parallel.mesh import make_mesh
from lwd_jax.parallel.rules import batch_shardings
from lwd_jax.train.feed import Feed

MESH = make_mesh(configs.Mesh(data=2, fsdp=4), jax.devices())


@pytest.fixture
def feed():
    batches = ToyBatches()
    made = Feed(batches, MESH)
    yield made, batches
    made.close()


def read_ahead(batches, at_least):
    """Waits until so many were read, and a little for one more."""
    until = time.monotonic() + 60
    while batches.index < at_least and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.2)
    return batches.index


def test_a_few_are_read_ahead(feed):
    feed, batches = feed
    assert read_ahead(batches, 3) == 3  # two that wait, and one that waits for its place
    for used in range(1, 4):
        assert next(feed).state == {"index": used}
        assert read_ahead(batches, used + 3) == used + 3


def test_they_lie_as_the_step_takes_them(feed):
    feed, _ = feed
    for number in range(2):
        found, expected = next(feed).batch, toy_batch(number)
        shardings = batch_shardings(expected, MESH)
        for name, array in expected.items():
            assert isinstance(found[name], jax.Array) and found[name].sharding == shardings[name]
            np.testing.assert_array_equal(found[name], array)


def test_replaced_pictures_are_counted_once():
    """What an iterator says it has replaced so far, as of the batch that was used last."""

    class Replacing(ToyBatches):
        @property
        def replaced(self):
            return [0, 1, 1, 3][min(self.index, 3)]

    feed = Feed(Replacing(), MESH)
    assert feed.replaced == 0
    assert [(next(feed).replaced, feed.replaced) for _ in range(3)] == [(1, 1), (1, 1), (3, 3)]
    feed.close()
