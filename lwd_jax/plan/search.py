"""Which settings make a train step fit a slice (`suggest`), and which are best for it (`sweep`): tried by compiling."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh

from lwd_jax.config import Config, Mesh
from lwd_jax.errors import UserError
from lwd_jax.nn.stack import REMAT
from lwd_jax.parallel.mesh import AXES, abstract_mesh, batch_parts, mesh_shape
from lwd_jax.plan.compile import plan_program
from lwd_jax.plan.estimate import Estimate, Shapes, batch_of, estimate, evaluate_shapes, state_bytes
from lwd_jax.plan.programs import Makers
from lwd_jax.plan.result import Result, limit
from lwd_jax.plan.roofline import roofline
from lwd_jax.plan.topology import Topology
from lwd_jax.train.program import check_sizes

MOST_PICTURES = 64  # of one place along data and fsdp, in one accumulation step
_ALIKE = 0.02  # rates that differ by less are alike


class Try(NamedTuple):
    """Settings and what is known of the train step under them.

    Attributes:
      settings: dotted field -> value, where they differ from the config that was given.
      config: with them.
      result: of the compiler; of shape evaluation where nothing can be compiled.
    """

    settings: dict[str, Any]
    config: Config
    result: Result

    @property
    def words(self) -> str:
        """As they are written on the command line."""
        return " ".join(f"--config.{name}={value}" for name, value in self.settings.items())


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """The config with some fields changed: {"remat": "full", "mesh.context": 2}."""
    for dotted, value in settings.items():
        section, _, field = dotted.rpartition(".")
        if section:
            field, value = section, dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{field: value})
    return config


def attempt(config: Config, settings: dict[str, Any], topology: Topology, makers: Makers, **how: bool) -> Try:
    """Compiles the train step under some settings; `how` as in `plan_program`."""
    changed = with_settings(config, settings)
    return Try(settings, changed, plan_program(changed, topology, makers, "train", **how))


# --------------------------------------------------------------------------------------------------- what makes it fit


def _contexts(config: Config, topology: Topology) -> Iterator[dict[str, int]]:
    """Settings of 2, 4 and 8 chips for one picture; they are taken from `data`, or else from `fsdp`."""
    data, fsdp, context, _ = mesh_shape(config.mesh, topology.size)
    for chips in (2, 4, 8):
        more = max(chips // context, 1)
        from_data = data % (more * topology.slices) == 0
        if chips <= context or chips % context or not (from_data or fsdp % more == 0):
            continue
        sizes = (data // more, fsdp) if from_data else (data, fsdp // more)
        settings = dict(zip(("mesh.data", "mesh.fsdp", "mesh.context"), (*sizes, chips)))
        accumulate = config.optimizer.accumulate * more  # as many chips fewer that take a picture each
        fits = config.data.batch_size % (accumulate * sizes[0] * sizes[1]) == 0
        yield settings | ({"optimizer.accumulate": accumulate} if fits else {})


def knobs(config: Config, topology: Topology) -> Iterator[dict[str, Any]]:
    """Settings that may make a train step fit, in the order of what they cost: recomputation, smaller parts of the same
    batch, several chips for one picture.
    """
    settings = {}
    if config.remat != "full":
        settings["remat"] = "full"
        yield dict(settings)
    data, fsdp, *_ = mesh_shape(config.mesh, topology.size)
    accumulate = config.optimizer.accumulate
    while config.data.batch_size % (2 * accumulate * data * fsdp) == 0:
        accumulate *= 2
        settings["optimizer.accumulate"] = accumulate
        yield dict(settings)
    for more in _contexts(with_settings(config, settings), topology):
        yield settings | more


def suggest(
    config: Config, topology: Topology, makers: Makers, on_try: Callable[[Try], None], **how: bool
) -> Try | None:
    """The first knob of a train step that makes it fit, or None. Each is compiled.

    Args:
      on_try: called with every one.
      how: fresh, fast, as in `plan_program`.
    """
    for settings in knobs(config, topology):
        tried = attempt(config, settings, topology, makers, **how)
        on_try(tried)
        if tried.result.fits(topology):
            return tried
    return None


# --------------------------------------------------------------------------------------------------------- what is best


class Candidate(NamedTuple):
    """Settings of a sweep that are not tried yet."""

    settings: dict[str, Any]
    config: Config
    estimate: Estimate


class Sweep(NamedTuple):
    """What a sweep found.

    Attributes:
      tried: in their order.
      candidates: how many settings were possible.
      pruned: why others were not -> how many (meshes, or meshes with a batch).
      best: the fastest that fits, None = none does; by estimate alone where `missing` says so.
      missing: what is not known of them, and why; "" = nothing.
    """

    tried: list[Try]
    candidates: int
    pruned: dict[str, int]
    best: Try | None
    missing: str


def meshes(devices: int) -> Iterator[tuple[int, ...]]:
    """Every (data, fsdp, context, tensor) of so many devices."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for data, fsdp, context in itertools.product(divisors, repeat=3):
        tensor, rest = divmod(devices, data * fsdp * context)
        if tensor and not rest:
            yield data, fsdp, context, tensor


def _refusal(sizes: tuple[int, ...], shapes: Shapes, slices: int) -> str:
    """Why a mesh is not possible; "" where it is."""
    data, _, context, tensor = sizes
    if data % slices:
        return "data does not divide over the slices"
    if shapes.heads % tensor:
        return "heads do not divide over tensor"
    if shapes.rows % context:
        return "a picture's rows do not divide over context"
    return ""


def _settings(config: Config, topology: Topology, sizes: tuple[int, ...], remat: str, batch: int) -> dict[str, Any]:
    """What must be written to have them: fields that differ from the config."""
    wanted = {f"mesh.{axis}": size for axis, size in zip(AXES, sizes)}
    try:
        same = dict(zip(wanted, mesh_shape(config.mesh, topology.size)))
    except UserError:  # a mesh of another slice: every axis is written
        same = {}
    wanted = wanted if wanted != same else {}
    now = {"remat": config.remat, "data.batch_size": config.data.batch_size}
    other = {"remat": remat, "data.batch_size": batch}
    return wanted | {name: value for name, value in other.items() if value != now[name]}


def _batches(config: Config, mesh: AbstractMesh) -> list[int]:
    """Powers of two pictures at every place; the batch of the config, where it divides."""
    place = batch_parts(mesh) * config.optimizer.accumulate
    found = {place * 2**power for power in range(int(math.log2(MOST_PICTURES)) + 1)}
    return sorted(found | ({config.data.batch_size} if config.data.batch_size % place == 0 else set()))


def candidates(config: Config, topology: Topology, shapes: Shapes) -> tuple[list[Candidate], Counter]:
    """Every mesh, remat policy and batch that is possible, and why others are not -> how many."""
    found, pruned = [], Counter()
    most = limit(topology) or math.inf
    for sizes in meshes(topology.size):
        mesh = abstract_mesh(sizes)
        if refusal := _refusal(sizes, shapes, topology.slices):
            pruned[refusal] += 1
            continue
        try:
            state = state_bytes(shapes, mesh)
        except UserError:
            pruned["a parameter does not divide over fsdp"] += 1
            continue
        if state > most:
            pruned["the state alone is too large for a chip"] += 1
            continue
        for batch in _batches(config, mesh):
            changed = with_settings(config, {"mesh": Mesh(*sizes), "data.batch_size": batch})
            try:
                check_sizes(changed, mesh, batch_of(shapes, batch))
            except UserError:
                pruned["the batch does not divide over the mesh"] += 1
                continue
            tried = [with_settings(changed, {"remat": remat}) for remat in shapes.work]
            tried = [(each, estimate(each, topology, shapes, mesh, state)) for each in tried]
            if tried[0][1].result.resident > most:
                pruned["state and batch alone are too large for a chip"] += 1
                continue
            for each, guess in tried:
                settings = _settings(config, topology, sizes, each.remat, batch)
                found.append(Candidate(settings, with_settings(config, settings), guess))
    return found, pruned


def _cost(result: Result, topology: Topology) -> float:
    """Of one picture, the less the better: chip seconds at the least time; FLOPs where a chip's speed is not known."""
    bounds = roofline(result, topology)
    return 1 / bounds.pictures_per_second if bounds else result.counted.total / result.pictures


def _preference(config: Config, candidate: Candidate) -> tuple:
    """Of candidates that are alike: what changes the training, then what is split, the least."""
    change = abs(math.log2(candidate.config.data.batch_size / config.data.batch_size))
    mesh = candidate.estimate.result.mesh
    return change, mesh["tensor"], mesh["context"], mesh["data"], list(REMAT).index(candidate.config.remat)


class Order:
    """Which candidate comes next: of those that should fit the fastest by estimate, else the smallest.

    What the compiler says of a remat policy corrects the estimates of the others of that policy: how much waits for the
    backward pass in fact, over the estimate.
    """

    def __init__(self, config: Config, topology: Topology):
        self._config, self._topology, self._ratio = config, topology, {}

    def peak(self, candidate: Candidate) -> float:
        """Bytes per chip, as far as is known."""
        guess = candidate.estimate
        return guess.result.resident + guess.temporaries * self._ratio.get(candidate.config.remat, 1.0)

    def key(self, candidate: Candidate) -> tuple:
        most = limit(self._topology) or math.inf
        peak = self.peak(candidate)
        rate = round(math.log(_cost(candidate.estimate.result, self._topology)) / _ALIKE)
        order = (rate, *_preference(self._config, candidate), peak)
        return (0, *order) if peak <= most else (1, peak, *order)

    def learn(self, candidate: Candidate, result: Result) -> None:
        if result.peak is not None:
            found = max(result.peak - candidate.estimate.result.resident, 0.0)
            self._ratio[candidate.config.remat] = found / candidate.estimate.temporaries


def _best(tried: list[Try], topology: Topology) -> Try | None:
    """The fastest that fits (or of which nothing says that it does not); of those that are alike, the first."""
    compiled = [each for each in tried if topology.devices is None or each.result.memory is not None]
    fitting = [each for each in compiled if each.result.fits(topology) is not False]
    if not fitting:
        return None
    least = min(_cost(each.result, topology) for each in fitting)
    return next(each for each in fitting if _cost(each.result, topology) <= (1 + _ALIKE / 2) * least)


def _attempt(config: Config, candidate: Candidate, topology: Topology, makers: Makers, how: dict) -> Try:
    """As `attempt`; what turns out to be impossible is a result too, for it is no reason to lose the others."""
    try:
        return attempt(config, candidate.settings, topology, makers, **how)
    except UserError as mistake:
        result = dataclasses.replace(candidate.estimate.result, missing=str(mistake))
        return Try(candidate.settings, candidate.config, result)


def _missing(topology: Topology) -> str:
    if topology.devices is None:
        return f"{topology.missing} Until then memory and times are estimates by shape, and nothing says that it fits."
    if not topology.chip.peak:
        return f"Memory and speed of {topology.name.partition(':')[0]} are not known: the order is by what is computed."
    return ""


def sweep(
    config: Config,
    topology: Topology,
    makers: Makers,
    most: int,
    on_try: Callable[[Try], None],
    **how: bool,
) -> Sweep:
    """The best mesh, remat policy and batch for a topology.

    The config as it is comes first, where it is possible; it is what the others are compared with.

    Args:
      most: how many are compiled, at most.
      on_try: called with every one.
      how: fresh, fast, as in `plan_program`.

    Raises:
      UserError: nothing is possible on this topology, and why.
    """
    shapes = evaluate_shapes(config, topology.chip.platform, tuple(REMAT))
    left, pruned = candidates(config, topology, shapes)
    if not left:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in pruned.most_common())
        raise UserError(f"No mesh, remat and batch of this run is possible on {topology.name}: {reasons}.")
    count, order, tried = len(left), Order(config, topology), []
    while left and len(tried) < most:
        as_it_is = [each for each in left if not each.settings] if not tried else []
        candidate = as_it_is[0] if as_it_is else min(left, key=order.key)
        left.remove(candidate)
        if topology.devices is None:
            found = Try(candidate.settings, candidate.config, candidate.estimate.result)
        else:
            found = _attempt(config, candidate, topology, makers, how)
            order.learn(candidate, found.result)
        tried.append(found)
        on_try(found)
    return Sweep(tried, count, dict(pruned), _best(tried, topology), _missing(topology))
