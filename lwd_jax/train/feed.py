"""Batches on the devices before they are asked for."""

import queue
import threading
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lwd_jax.parallel.mesh import process_share
from lwd_jax.parallel.rules import batch_shardings

_AHEAD = 2  # batches


class Fed(NamedTuple):
    """`batch` on the devices, `state`: where the data stand once it has been used (JSON), and `replaced` by then."""

    batch: dict[str, jax.Array]
    state: dict
    replaced: int


class Feed:
    """Reads batches in a thread and puts them on the mesh, a few ahead of the step.

    The position that is saved is that of the batches *used*, not of those read ahead.

    Args:
      batches: an iterator of dicts of numpy arrays (this process's part of each batch) with `.state()`, `.close()`
        and `.replaced`.
      mesh: where they go.

    Attributes:
      waited: seconds that `next` has waited for data.
      replaced: how many pictures of the batches used this process could not read and replaced.
    """

    def __init__(self, batches: Any, mesh: Mesh):
        self._batches, self._mesh = batches, mesh
        self._parts = len(process_share(mesh).blocks)
        self._queue: queue.Queue = queue.Queue(_AHEAD)
        self._ended = threading.Event()
        self.waited, self.replaced = 0.0, 0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        shapes = {
            name: jax.ShapeDtypeStruct((array.shape[0] * self._parts, *array.shape[1:]), array.dtype)
            for name, array in batch.items()
        }
        shardings = batch_shardings(shapes, self._mesh)
        return {
            name: jax.make_array_from_process_local_data(shardings[name], array, shapes[name].shape)
            for name, array in batch.items()
        }

    def _put(self, item: Fed | Exception) -> None:
        while not self._ended.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _read(self) -> None:
        try:
            while not self._ended.is_set():
                batch = next(self._batches)
                self._put(Fed(self._place(batch), self._batches.state(), self._batches.replaced))
        except Exception as error:  # whatever reading raises is raised again where the batch is asked for
            self._put(error)

    def __next__(self) -> Fed:
        start = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, Exception):
            raise item
        self.replaced = item.replaced
        return item

    def close(self) -> None:
        """Ends the thread and closes the iterator, wherever it had read to."""
        self._ended.set()
        self._thread.join()
        self._batches.close()
