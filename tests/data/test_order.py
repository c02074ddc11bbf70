"""Laws of the endless stream: one bucket per batch, every record in every epoch, a pure function of its place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwd_jax.data.order import Order, mix, permutation, uniform
from lwd_jax.errors import UserError

BUCKETS = st.lists(st.integers(-1, 4), min_size=1, max_size=60).filter(lambda b: max(b) >= 0)


@given(BUCKETS, st.integers(1, 9), st.integers(0, 3), st.integers(0, 5))
def test_batches_have_one_bucket_and_epochs_are_complete(bucket_of, batch_size, seed, epoch):
    bucket_of = np.array(bucket_of)
    order = Order(bucket_of, batch_size, seed)
    start = epoch * order.batches_per_epoch * batch_size
    records = np.array([order.record(start + i) for i in range(order.batches_per_epoch * batch_size)])
    assert order.epoch(start) == epoch == order.epoch(start + len(records) - 1)
    assert (bucket_of[records].reshape(-1, batch_size) == bucket_of[records[::batch_size], None]).all()
    assert set(records) == set(np.flatnonzero(bucket_of >= 0))
    for bucket in set(bucket_of) - {-1}:
        size, shown = np.sum(bucket_of == bucket), np.bincount(records[bucket_of[records] == bucket])
        assert shown.sum() == -(-size // batch_size) * batch_size  # no more batches than needed
        if size >= batch_size:
            assert shown.max() <= 2


@given(BUCKETS, st.integers(1, 5))
def test_replacements_lie_in_the_bucket_and_reach_all_of_it(bucket_of, batch_size):
    bucket_of = np.array(bucket_of)
    order = Order(bucket_of, batch_size, 0)
    first = order.record(0)
    members = set(np.flatnonzero(bucket_of == bucket_of[first]))
    assert {order.record(0, attempt) for attempt in range(2 * len(members) + 1)} == members
    with pytest.raises(UserError, match="can be read"):
        order.record(0, 2 * len(members) + 1)


def test_seeds_and_epochs_shuffle_differently():
    orders = [
        [Order(np.zeros(50), 5, seed).record(start + i) for i in range(50)] for seed in (0, 1) for start in (0, 50)
    ]
    assert len({tuple(o) for o in orders}) == 4 and all(sorted(o) == list(range(50)) for o in orders)


def test_every_epoch_shuffles_batches_and_members_anew():
    whole = Order(np.zeros(40), 40, 0)  # one batch: the order within it
    assert len({tuple(whole.record(40 * epoch + i) for i in range(40)) for epoch in range(5)}) == 5
    single = Order(np.arange(40), 1, 0)  # forty buckets of one: the order of the batches
    assert len({tuple(single.record(40 * epoch + i) for i in range(40)) for epoch in range(5)}) == 5


def test_buckets_of_equal_size_are_shuffled_differently():
    order = Order(np.arange(80) % 2, 40, 0)  # two batches: the even records, and the odd ones
    one, two = np.array([order.record(i) for i in range(80)]).reshape(2, 40) // 2
    assert sorted(one) == sorted(two) == list(range(40)) and (one != two).any()


def test_the_last_batch_is_filled_from_another_shuffle():
    streams = [[order.record(i) for i in range(80)] for order in (Order(np.zeros(41), 40, seed) for seed in range(5))]
    filled = 0
    for stream in streams:
        full, rest = (stream[:40], stream[40:]) if len(set(stream[:40])) == 40 else (stream[40:], stream[:40])
        filled += rest[1:] != full[:39] and rest[:39] != full[:39]
    assert filled == 5


def test_permutations_are_uniform():
    first = np.bincount([permutation(6, seed)[0] for seed in range(6000)], minlength=6)
    assert abs(first - 1000).max() < 150  # five standard deviations
    assert sorted(permutation(1000, 3)) == list(range(1000))


def test_hashes_are_pinned():
    """Written down, so that a change that would reorder every running job cannot pass unseen."""
    assert int(mix(0)) == 0xE220A8397B1DCDAF  # the published first output of SplitMix64 from seed 0
    assert uniform(1, 2, 3) == 0.814259011529328
    values = np.array([uniform(7, i) for i in range(4000)])
    assert abs(values.mean() - 0.5) < 0.025 and abs(values.var() - 1 / 12) < 0.01


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="no pictures"):
        Order(np.array([-1, -1]), 2, 0)
