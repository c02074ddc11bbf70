"""Endless, shuffled training batches whose state is one number, and the held-out examples.

Every example is a pure function of (config, its place in the stream), see data/order.py. So the batches are the same
for any number of worker processes and hosts, and after a restart at any place.
"""

import hashlib
import logging
import multiprocessing
import os
import threading

import grain
import grain.experimental
import numpy as np
from absl import flags

from lwd_jax.config import Config
from lwd_jax.data import buckets, order
from lwd_jax.data.dataset import Dataset, open_dataset
from lwd_jax.data.dataset import held_out as held_out_numbers
from lwd_jax.data.latents import Latents, open_latents
from lwd_jax.data.order import Order
from lwd_jax.data.pictures import UNREADABLE, decode
from lwd_jax.data.records import STORAGE
from lwd_jax.errors import UserError

STATE = "global_next_index"
IDENTITY = "identity"
ENDLESS = 1 << 62
READ_THREADS = 4
_LOG = logging.getLogger(__name__)


class Pictures:
    """Stage 1: {"picture": [H W 3] uint8} at a place of the stream; a picture that cannot be read is replaced."""

    def __init__(
        self, dataset: Dataset, config: Config, stream: Order, bucket_of: np.ndarray, table: list[tuple[int, int]]
    ):
        self.dataset, self.stream, self.bucket_of, self.table = dataset, stream, bucket_of, table
        self.seed, self.flip, self.random_crop = config.seed, config.data.flip, config.data.buckets

    def __call__(self, index: int) -> dict:
        place = (0.5, 0.5)
        if self.random_crop:
            place = tuple(order.uniform(self.seed, order.CROP, index, axis) for axis in (0, 1))
        attempt = 0
        while True:
            number = self.stream.record(index, attempt)
            example = self.dataset[number]
            try:
                picture = decode(example.picture, self.table[self.bucket_of[number]], place)
                break
            except UNREADABLE as error:
                _LOG.warning("Record %d cannot be read and is replaced: %s", number, error)
                attempt += 1
        if self.flip and order.uniform(self.seed, order.FLIP, index) < 0.5:
            picture = picture[:, ::-1]
        return {"picture": np.ascontiguousarray(picture), "replaced": np.uint8(attempt > 0)}


class Encoded:
    """Stage 2: latent mean and std and text states at a place of the stream.

    One caption alternative is drawn; with probability `matching.caption_dropout` the empty caption takes its place.
    """

    def __init__(self, latents: Latents, config: Config, stream: Order):
        self.latents, self.stream = latents, stream
        self.seed, self.dropout = config.seed, config.matching.caption_dropout
        self.dtype = STORAGE[config.dtype]

    def __call__(self, index: int) -> dict:
        number = self.stream.record(index)
        states = self.latents.null_text
        if order.uniform(self.seed, order.DROPOUT, index) >= self.dropout:
            draw = order.uniform(self.seed, order.CAPTION, index)
            states, _ = self.latents.text(number, int(draw * self.latents.caption_count(number)))
        example = _latent_example(self.latents, number, states)
        # The first thing a backbone does is to round them: half the bytes go from host to device, and stay there.
        return example | {"tokens": example["tokens"].astype(self.dtype), "replaced": np.uint8(0)}


def _latent_example(latents: Latents, number: int, states) -> dict:
    mean, std = latents.latent(number)
    return {"mean": mean, "std": std, "tokens": states.tokens, "token_mask": states.mask, "pooled": states.pooled}


def _end_with_parent() -> None:
    """Ends a worker process when the one that started it is gone: killed, it could not tell its workers."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


class _Source(grain.sources.RandomAccessDataSource):
    """The stream, arranged so that grain's strided shards are the processes' rows of each global batch."""

    def __init__(self, example, batch_size: int, blocks: np.ndarray):
        self.example, self.batch_size = example, batch_size
        rows = np.arange(batch_size).reshape(blocks.size, -1)
        self.order = rows[blocks].reshape(len(blocks), -1).T.reshape(-1)  # row of a batch, one process after another

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        _end_with_parent()  # it is unpickled by worker processes

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict:
        batch, slot = divmod(int(index), self.batch_size)
        return self.example(batch * self.batch_size + int(self.order[slot]))


class Batches:
    """An endless iterator over this process's rows of the global batches; dicts of numpy arrays.

    Attributes:
      global_batch: rows of a batch over all processes.
      batches_per_epoch: after so many batches every picture has been shown at least once.
      shapes: the distinct (height, width), px, that batches come in.
      replaced: how many unreadable pictures of this process were replaced so far.
    """

    def __init__(self, example, stream: Order, shapes, config, identity: str, process_index: int, blocks: np.ndarray):
        self.global_batch = config.data.batch_size
        self.batches_per_epoch = stream.batches_per_epoch
        self.shapes = shapes
        self.replaced = 0
        self._identity = identity
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags
        workers = config.data.workers
        elastic = grain.experimental.ElasticIterator(
            grain.MapDataset.source(_Source(example, self.global_batch, blocks)),
            self.global_batch,
            grain.sharding.ShardOptions(process_index, len(blocks)),
            # Grain's own default buffers 500 examples, which is 25 GB at 4096 px.
            read_options=grain.ReadOptions(READ_THREADS, max(READ_THREADS, self.global_batch // len(blocks))),
            multiprocessing_options=grain.MultiprocessingOptions(workers) if workers else None,
        )
        self._iterator = iter(elastic)

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        # Copies: a worker's arrays lie in shared memory, which stays behind if the last of them ends with the process.
        batch = {name: np.array(value) for name, value in next(self._iterator).items()}
        self.replaced += int(batch.pop("replaced").sum())
        return batch

    def state(self) -> dict[str, int]:
        """{STATE: pictures of the global stream that were handed out, IDENTITY: of the data}; the same on every
        process.
        """
        return {STATE: int(self._iterator.get_state()[STATE]), IDENTITY: self._identity}

    def restore(self, state: dict[str, int]) -> None:
        """Continues at a state, of a run with any number of processes and workers.

        A state that is no multiple of the batch size (which was changed) is rounded up to the next batch.

        Raises:
          UserError: the state is of other data.
        """
        if state.get(IDENTITY, self._identity) != self._identity:
            raise UserError(
                "The data at the config's path are not those this run was started with: pictures, captions or what "
                "encoded them changed. Bring them back, or use a new --workdir."
            )
        batches = -(-int(state[STATE]) // self.global_batch)
        self._iterator.set_state({STATE: batches * self.global_batch})

    def close(self) -> None:
        """Ends the worker processes."""
        self._iterator.close()


def _check_batch(config: Config, blocks: np.ndarray) -> None:
    if config.data.batch_size % blocks.size:
        raise UserError(f"data.batch_size {config.data.batch_size} does not divide into {blocks.size} parts.")


def _open_dataset(config: Config) -> Dataset:
    if not config.data.dataset:
        raise UserError("Stage 1 reads pictures: set data.dataset to a folder made by lwd prepare.")
    return open_dataset(config.data.dataset)


def _open_latents(config: Config) -> Latents:
    if not config.data.latents:
        raise UserError("Stage 2 reads latents: set data.latents to a folder made by lwd encode.")
    latents = open_latents(config.data.latents)
    made, wanted = latents.metadata["resolution"], config.resolution
    if made != wanted:
        raise UserError(
            f"The latents in '{latents.folder}' were made at {made} px, but the config's resolution is {wanted}."
        )
    if latents.metadata["buckets"] != config.data.buckets:
        kinds = {True: "aspect buckets", False: "squares"}
        made, wanted = kinds[latents.metadata["buckets"]], kinds[config.data.buckets]
        raise UserError(f"The latents in '{latents.folder}' are {made}, but the config's data.buckets wants {wanted}.")
    return latents


def _without_held_out(bucket_of: np.ndarray, sha256: np.ndarray, count: int) -> np.ndarray:
    kept = bucket_of.copy()
    kept[held_out_numbers(sha256, count)] = -1
    return kept


def _tell_of_small(stream: Order) -> None:
    """Of sizes that few latents have. Stage 1 lets such buckets join a neighbour; a latent's size is as it is."""
    size, counts = stream.batch_size, np.array([len(members) for members in stream.members])
    small = counts[counts < size]
    if len(counts) == 1 or not len(small):
        return
    _LOG.warning(
        "%d of %d latents are of %d sizes that fewer than data.batch_size = %d have. A batch has one size, so they are "
        "seen more often than others, up to %d times an epoch; lwd encode --smallest-bucket %d lets them join others.",
        small.sum(), counts.sum(), len(small), size, -(-size // small.min()), size,
    )  # fmt: skip


ALONE = np.zeros((1, 1), int)  # one process that reads everything


def make_batches(
    config: Config, *, process_index: int = 0, blocks: np.ndarray = ALONE, start_index: int = 0
) -> Batches:
    """The training batches of a config.

    Stage 1: {"picture": uint8 [B H W 3]}. Stage 2: {"mean", "std": [B h w C] unscaled, "tokens": [B L D], "token_mask":
    [B L], "pooled": [B P]}, float32 but for the tokens, which have the config's dtype; caption dropout is applied. B
    counts this process's rows. All pictures of a global batch have one bucket's shape.

    Args:
      process_index: which row of `blocks` this process reads.
      blocks: [processes, n]: a global batch is `blocks.size` equal blocks of rows, and each process reads those of its
        row, ascending (`parallel.mesh.process_share`).
      start_index: a state's number: pictures of the global stream to pass over.

    Raises:
      UserError: nothing to read from; latents of another resolution; a batch that does not divide; too few pictures.
    """
    _check_batch(config, blocks)
    if config.stage == 1:
        dataset = _open_dataset(config)
        training = np.setdiff1d(np.arange(len(dataset)), held_out_numbers(dataset.sha256, config.data.held_out))
        bucket_of = np.full(len(dataset), -1)
        bucket_of[training], table = buckets.assign(
            dataset.heights[training],
            dataset.widths[training],
            config.resolution,
            config.data.buckets,
            config.data.batch_size,
        )
        stream = Order(bucket_of, config.data.batch_size, config.seed)
        example = Pictures(dataset, config, stream, bucket_of, table)
        shapes = [table[bucket] for bucket in np.unique(bucket_of[training])]
        identity = hashlib.sha256(dataset.sha256.tobytes()).hexdigest()
    else:
        latents = _open_latents(config)
        found, bucket_of = np.unique(latents.sizes, axis=0, return_inverse=True)
        bucket_of = _without_held_out(bucket_of.reshape(-1), latents.sha256, config.data.held_out)
        stream = Order(bucket_of, config.data.batch_size, config.seed)
        if process_index == 0:
            _tell_of_small(stream)
        example = Encoded(latents, config, stream)
        shapes = [tuple(map(int, found[bucket])) for bucket in np.unique(bucket_of[bucket_of >= 0])]
        identity = latents.metadata["content"]
    batches = Batches(example, stream, shapes, config, identity, process_index, blocks)
    batches.restore({STATE: start_index})
    return batches


def _held_out_latents(config: Config) -> tuple[Latents, np.ndarray]:
    """The held-out records that share their most frequent shape: a batch has one shape."""
    latents = _open_latents(config)
    numbers = held_out_numbers(latents.sha256, config.data.held_out)
    _, shape, counts = np.unique(latents.sizes[numbers], axis=0, return_inverse=True, return_counts=True)
    return latents, numbers[shape.reshape(-1) == np.argmax(counts)]


def held_out(config: Config) -> dict[str, np.ndarray]:
    """The held-out examples as one batch, for previews and validation; no flips, no random crops, no caption dropout.

    Stage 1: centre squares. Stage 2: those of the most frequent shape, with their first captions.

    Raises:
      UserError: as `make_batches`; or no example is held out, or none can be read.
    """
    if not config.data.held_out:
        raise UserError("data.held_out is 0: no pictures are kept for previews.")
    examples = []
    if config.stage == 2:
        latents, numbers = _held_out_latents(config)
        examples = [_latent_example(latents, number, latents.text(number, 0)[0]) for number in numbers]
    else:
        dataset = _open_dataset(config)
        for number in held_out_numbers(dataset.sha256, config.data.held_out):
            example = dataset[number]
            try:
                examples.append({"picture": decode(example.picture, (config.resolution, config.resolution))})
            except UNREADABLE as error:
                _LOG.warning("Held-out record %d cannot be read: %s", number, error)
    if not examples:
        raise UserError("None of the held-out pictures can be read.")
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def held_out_captions(config: Config) -> list[str]:
    """The first captions of the held-out examples, in the order of `held_out`; "" where there is none."""
    if config.stage == 2:
        latents, numbers = _held_out_latents(config)
        return [latents.text(number, 0)[1] for number in numbers]
    dataset = _open_dataset(config)
    numbers = held_out_numbers(dataset.sha256, config.data.held_out)
    return [next(iter(dataset[number].captions), "") for number in numbers]
