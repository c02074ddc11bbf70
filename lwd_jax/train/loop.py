"""The loop around the step: resume or begin, train, report, preview, save, stop."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils.epath import Path
from jax.sharding import Mesh
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lwd_jax.config import Config, to_json
from lwd_jax.errors import UserError
from lwd_jax.files import Spool, locate, locked
from lwd_jax.parallel.mesh import over
from lwd_jax.parallel.processes import agree, check_shared, summed, verdict
from lwd_jax.parallel.rules import replicated
from lwd_jax.train.checkpoint import Checkpoints, saved_steps
from lwd_jax.train.feed import Feed
from lwd_jax.train.metrics import Window, Writer, read
from lwd_jax.train.models import MODEL_FILE, check_same_base
from lwd_jax.train.program import Program
from lwd_jax.train.state import State, eval_params

_PREVIEW = "preview/"  # before the names of their metrics
_INIT = 2**31  # folded into the seed's key for the initial parameters: beyond every step
Previews = Callable[[int, Any], dict]  # (step, parameters for evaluation) -> scalar metrics


class Outcome(NamedTuple):
    """`step` reached and saved; `signal` that came, or 0."""

    step: int
    signal: int


class Stop:
    """Notes SIGTERM and SIGINT while the run is inside; a second signal acts as it would without this.

    In a run of several processes jax listens for SIGTERM and tells all of them the step to stop at
    (`Checkpoints.preempted`); SIGINT is passed on as SIGTERM.
    """

    def __enter__(self) -> "Stop":
        self.signal = 0
        self._before = {}
        alone = jax.process_count() == 1
        handlers = {signal.SIGTERM: self._note, signal.SIGINT: self._note} if alone else {signal.SIGINT: self._pass_on}
        if threading.current_thread() is threading.main_thread():  # only it may
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def _pass_on(self, number, frame) -> None:
        signal.signal(number, self._before[number])
        os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, number, frame) -> None:
        self.signal = number
        signal.signal(number, self._before[number])

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Reporter:
    """Takes the metrics of a step when the next one is on its way, so that the devices do not wait for the host (with
    several processes once a line, for what they count).
    """

    def __init__(self, config: Config, writer: Writer, feed: Feed, progress: Progress):
        self._progress, self._training = progress, config.training
        self._pictures = config.data.batch_size
        self._writer, self._feed = writer, feed
        self._window, self._pending, self._waited = Window(), None, 0.0
        self._loss, self._speed, self._wait_share = float("nan"), 0.0, 0.0

    def took(self, step: int, metrics: dict) -> None:
        """Step `step` was started; looks at the one before, and writes its line where one is due."""
        before = self._pending
        self._look()
        if before is not None and before[0] % self._training.log_every == 0:
            self._write(before[0])
        self._pending = (step, metrics)
        self._progress.update(
            self._progress.task_ids[0], completed=step, loss=self._loss, speed=self._speed, wait=self._wait_share
        )

    def _look(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = jax.device_get(metrics)
        self._window.add(metrics, self._pictures)
        self._loss = float(metrics["loss"])
        if metrics["streak"] >= self._training.nonfinite_limit:
            bad = [name for name in ("loss", "grad_norm") if not abs(float(metrics[name])) < float("inf")]
            raise UserError(
                f"{' and '.join(bad)} not finite for {int(metrics['streak'])} steps in a row, up to step {step}; the "
                "state is as it was before them. Lower optimizer.learning_rate, or look at the data."
            )

    def flush(self, step: int) -> None:
        """Waits for `step` and writes the window that ends with it."""
        self._look()
        self._write(step)

    def away(self, seconds: float) -> None:
        """So many seconds were not training, but previews or saving."""
        self._window.restart_clock(seconds)

    def _write(self, step: int) -> None:
        waited, self._waited = self._feed.waited - self._waited, self._feed.waited
        line = self._window.line(waited)
        self._speed, self._wait_share = line["pictures_per_second"], line["data_wait_share"]
        self._writer.write(step, line | {"replaced_pictures": summed(self._feed.replaced)})
        if not self._progress.console.is_terminal and jax.process_index() == 0:  # a log file sees no bar
            left = self._progress.tasks[0].time_remaining
            print(
                f"step {step} loss {self._loss:.4f} pictures/s {self._speed:.2f} waiting for data "
                f"{self._wait_share:.0%} ETA {'?' if left is None else f'{left:.0f}'} s",
                flush=True,
            )


def _progress(config: Config, first: int) -> Progress:
    progress = Progress(
        TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("ETA"), TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.2f} pictures/s"),
        TextColumn("waiting for data {task.fields[wait]:.0%}"),
        transient=True, disable=jax.process_index() != 0,
    )  # fmt: skip
    name, total = config.name or "training", config.training.steps
    progress.add_task(name, total=total, completed=first, loss=float("nan"), speed=0.0, wait=0.0)
    return progress


class _Profiler:
    """A trace of the steps profile_start .. profile_stop - 1 in workdir/profile; closed with the run at the latest."""

    def __init__(self, config: Config, workdir: Path):
        self._start, self._stop = config.training.profile_start, config.training.profile_stop
        self._folder, self._spool = workdir / "profile", None
        if self._start >= 0 and self._stop <= self._start:
            raise UserError(f"training.profile_stop {self._stop} must come after training.profile_start {self._start}.")
        if self._start > config.training.steps:
            raise UserError(f"training.profile_start {self._start} lies beyond training.steps {config.training.steps}.")

    def before(self, step: int) -> None:
        if step == self._start:
            self._spool = Spool(self._folder)
            jax.profiler.start_trace(str(self._spool.here))
        if step == self._stop:
            self.close()

    def close(self) -> None:
        if self._spool is not None:
            jax.profiler.stop_trace()
            self._spool.close()
            self._spool = None


class _Previewer:
    """Previews before the first step, every `preview_every` steps and after the last one."""

    def __init__(self, previews: Previews | None, config: Config, mesh: Mesh):
        self._previews, self._mesh = previews, mesh
        self._every, self._last = config.training.preview_every, config.training.steps

    def due(self, step: int) -> bool:
        return self._previews is not None and self._every > 0 and (step % self._every == 0 or step == self._last)

    def look(self, step: int, state: State) -> tuple[dict, float]:
        """The metrics, named preview/.., and the seconds they took."""
        jax.block_until_ready(state.step)
        start = time.perf_counter()
        found = over(self._mesh, self._previews)(step, eval_params(state))
        return {f"{_PREVIEW}{name}": float(value) for name, value in found.items()}, time.perf_counter() - start


def _seen(workdir: Path, step: int) -> bool:
    """Whether the previews of a step are in its metrics."""
    names = (name for line in read(workdir) if line["step"] == step for name in line)
    return any(name.startswith(_PREVIEW) for name in names)


def _first_state(program: Program, config: Config, params: Callable[[], Any] | None) -> State:
    key = jax.random.fold_in(jax.random.key(config.seed), _INIT)
    return program.init(key, params() if params is not None else None)


def _take(workdir: Path, saved: list[int], closing: contextlib.ExitStack) -> str:
    """Locks the workdir until `closing`; why it is not this run's, or ""."""
    try:
        closing.enter_context(locked(workdir, "it"))
    except UserError as taken:
        return str(taken)
    return "" if saved_steps(workdir) == saved else "another run wrote checkpoints there while this one began."


def _begin(program: Program, config: Config, workdir: Path, description: str, params, closing: contextlib.ExitStack):
    """(checkpoints, state, data position or None): of a new run, or of the newest checkpoint; the workdir is there."""
    saved = saved_steps(workdir)
    if saved:
        check_same_base(workdir, description)
    agree(str(saved), f"{workdir} does not hold the same checkpoints for all processes: they must share it.")
    # Weights that do not fit are a mistake to be told of before anything is written.
    state, position = (None if saved else _first_state(program, config, params)), None
    workdir.mkdir(parents=True, exist_ok=True)
    check_shared(workdir)
    if taken := verdict(_take(workdir, saved, closing) if jax.process_index() == 0 else ""):
        raise UserError(f"{workdir} is not this run's to write to: {taken}")
    checkpoints = Checkpoints(workdir, config.training.keep)
    closing.callback(checkpoints.close)
    if saved:
        state, position = checkpoints.restore(program.state, config)
        if config.adapter.kind != "none":
            state = program.complete(state, params())
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(to_json(config) + "\n")
        (workdir / MODEL_FILE).write_text(description)
    return checkpoints, state, position


class _Held(NamedTuple):
    """What a run holds open while it trains."""

    stop: Stop
    profiler: _Profiler
    checkpoints: Checkpoints
    feed: Feed
    writer: Writer
    reporter: _Reporter
    previewer: _Previewer


def _steps(program: Program, config: Config, held: _Held, state: State, first: int, key: jax.Array) -> Outcome:
    """From the step after `first` to the last one, or until a signal."""
    total, reporter, checkpoints = config.training.steps, held.reporter, held.checkpoints
    for step in range(first + 1, total + 1):
        # Train
        held.profiler.before(step)
        batch, position, _ = next(held.feed)
        state, metrics = program.step(state, batch, key)
        reporter.took(step, metrics)
        if checkpoints.preempted(step):
            held.stop.signal = signal.SIGTERM
        ending = step == total or bool(held.stop.signal)

        # Save
        saving, due = step % config.training.save_every == 0 or ending, held.previewer.due(step)
        if saving or due:
            reporter.flush(step)
        if saving:
            start = time.perf_counter()
            held.writer.push()  # first, so that no checkpoint is without the lines before it
            checkpoints.save(state, position, config)
            reporter.away(time.perf_counter() - start)
            ending = ending or bool(held.stop.signal)  # it came meanwhile
        checkpoints.seal()

        # Look, after a signal when the run is resumed: previews can take longer than what is left then
        if due and not held.stop.signal:
            seen, seconds = held.previewer.look(step, state)
            reporter.away(seconds)
            if seen:
                held.writer.write(step, seen)
        if ending:
            break

    checkpoints.finish(step)
    return Outcome(step, held.stop.signal)


def run(
    program: Program,
    batches: Any,
    config: Config,
    workdir: str | os.PathLike,
    mesh: Mesh,
    *,
    description: str,
    params: Callable[[], Any] | None = None,
    previews: Previews | None = None,
) -> Outcome:
    """Trains to `training.steps`, from the newest checkpoint of the workdir if there is one.

    Args:
      program: of `build_program`.
      batches: an iterator of this process's part of each batch, with `.state()`, `.restore(state)` and `.close()`.
      config: the resolved config; written to the workdir.
      workdir: made if it is not there.
      mesh: the program's.
      description: of the model, written to the workdir as model.json.
      params: reads the parameters to start from; on resuming called for the base of adapters alone; None = random ones.
      previews: called before the first step, every `preview_every` steps and after the last one.

    Raises:
      UserError: the workdir belongs to another run, or another process writes to it; the loss or gradient stays
        non-finite; the disk is full.
    """
    with contextlib.ExitStack() as closing:
        stop = closing.enter_context(Stop())
        workdir = locate(workdir)
        profiler = _Profiler(config, workdir)
        closing.callback(profiler.close)
        checkpoints, state, position = _begin(program, config, workdir, description, params, closing)
        first, previewer = int(state.step), _Previewer(previews, config, mesh)
        unseen = previewer.due(first) and verdict("" if _seen(workdir, first) else "not seen")
        if first >= config.training.steps and not unseen:
            return Outcome(first, 0)
        writer = Writer(workdir, first)
        closing.callback(writer.close)
        if unseen and (seen := previewer.look(first, state)[0]):
            writer.write(first, seen)
        if first >= config.training.steps:
            return Outcome(first, 0)
        if position is not None:
            batches.restore(position)
        feed = Feed(batches, mesh)
        closing.callback(feed.close)
        reporter = _Reporter(config, writer, feed, closing.enter_context(_progress(config, first)))
        # Made on every device: a device_put moves no key to the devices of other processes.
        key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=replicated(mesh))()
        held = _Held(stop, profiler, checkpoints, feed, writer, reporter, previewer)
        return _steps(program, config, held, state, first, key)
