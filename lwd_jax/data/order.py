"""Which record stands at which place of the endless training stream: a pure function of (seed, index).

Nothing here has state, so the position of a run is one number, and worker processes, hosts and restarts cannot
disagree. Randomness comes from integer hashing, not from numpy's generators, whose streams may change between numpy
versions.
"""

import functools
import math

import numpy as np

from lwd_jax.errors import UserError

# What a random number is for: separate streams of one seed.
BATCHES, PICTURES, CROP, FLIP, CAPTION, DROPOUT = range(6)


def mix(*words) -> np.ndarray:
    """Uniform uint64 hashes of integer words (scalars or arrays, broadcast), by chained SplitMix64 finalisers.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    with np.errstate(over="ignore"):
        state = np.uint64(0)
        for word in words:
            state = (state ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(*words) -> float:
    """A uniform number in [0, 1) that depends on nothing but `words`."""
    return int(mix(*words)) / 2**64


@functools.lru_cache(maxsize=64)
def permutation(n: int, *words: int) -> np.ndarray:
    """A permutation of range(n) that depends on nothing but `words`."""
    return np.argsort(mix(*words, np.arange(n)), kind="stable")


class Order:
    """The endless stream of records in which every batch lies in one bucket.

    In each epoch the members of a bucket are shuffled and cut into batches; the last batch of a bucket is filled up
    from another shuffle of the same bucket. So each epoch shows every record at least once, and a bucket that holds at
    least a batch shows none more than twice. The batches of all buckets are then shuffled.
    """

    def __init__(self, bucket_of: np.ndarray, batch_size: int, seed: int):
        """`bucket_of` [N]: the bucket number of each record; a negative one keeps the record out of the stream."""
        bucket_of = np.asarray(bucket_of)
        self.batch_size = batch_size
        self.seed = seed
        self.members = [np.flatnonzero(bucket_of == bucket) for bucket in np.unique(bucket_of[bucket_of >= 0])]
        if not self.members:
            raise UserError("There are no pictures to train on.")
        counts = [math.ceil(len(members) / batch_size) for members in self.members]
        self._bucket = np.repeat(np.arange(len(counts)), counts)
        self._part = np.concatenate([np.arange(count) for count in counts])

    @property
    def batches_per_epoch(self) -> int:
        return len(self._bucket)

    def epoch(self, index: int) -> int:
        """The epoch of place `index` of the stream."""
        return index // (self.batches_per_epoch * self.batch_size)

    def record(self, index: int, attempt: int = 0) -> int:
        """The record at place `index` of the stream.

        Args:
          index: place, from 0; the batch is index // batch_size.
          attempt: 0 for the record itself; 1, 2, ... for its replacements, of the same bucket, when it cannot be read.

        Raises:
          UserError: after two rounds through the bucket: none of it can be read.
        """
        batch, slot = divmod(index, self.batch_size)
        epoch, place = divmod(batch, self.batches_per_epoch)
        place = permutation(self.batches_per_epoch, self.seed, BATCHES, epoch)[place]
        bucket = int(self._bucket[place])
        members = self.members[bucket]
        if attempt > 2 * len(members):
            raise UserError(f"None of the {len(members)} pictures of one aspect bucket can be read.")
        shuffle, position = divmod(int(self._part[place]) * self.batch_size + slot + attempt, len(members))
        return int(members[permutation(len(members), self.seed, PICTURES, epoch, bucket, shuffle)[position]])
