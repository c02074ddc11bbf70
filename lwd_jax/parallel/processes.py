"""Whether this process is one of several of the same run, and how they find each other.

Each of them gets the same command. The environment says who they are: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID (any machines), a SLURM step of several tasks, or a TPU slice of several hosts.
"""

import glob
import hashlib
import http.client
import importlib.util
import os
import secrets
import socket
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

import jax
import numpy as np
from etils.epath import Path
from jax.experimental import multihost_utils

from lwd_jax.errors import TEMPORARY, TOLD, Transient, UserError, sentence

MODES = ("auto", "on", "off")
WAIT = 300  # seconds for all processes to come
_LEAVE = 60  # seconds that a process waits at its end for the others; jax's own 300 would hold back every mistake
_METADATA_WAIT = 30  # seconds for the metadata server, which may be slow or busy when a slice starts
_METADATA_TRY = 5  # seconds of them for one answer
_SEEN_WAIT = 60  # seconds until what one host wrote must be seen by all; network file systems cache folders
_NAMED = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


# ------------------------------------------------------------------------------------------------ what is said


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(f"{name} must be a whole number, but it is '{environ[name]}'.") from None


def _named(environ: Mapping[str, str]) -> dict | None:
    """By the three JAX_ variables."""
    given = [name for name in _NAMED if environ.get(name)]
    if not given or given == [_NAMED[0]] and _slurm(environ) is not None:  # an address alone overrides SLURM's
        return None
    if missing := [name for name in _NAMED if name not in given]:
        raise UserError(f"{' and '.join(given)} set, but not {' and '.join(missing)}: set all three or none.")
    count, number = _number(environ, _NAMED[1]), _number(environ, _NAMED[2])
    address = environ[_NAMED[0]]
    if not 0 <= number < count:
        raise UserError(f"JAX_PROCESS_ID is {number}, but JAX_NUM_PROCESSES {count} has 0 to {count - 1}.")
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise UserError(f"JAX_COORDINATOR_ADDRESS must be HOST:PORT, but it is '{address}'.")
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": number,
        "cluster_detection_method": "deactivate",  # these three are the whole truth
    }


def _slurm_devices(environ: Mapping[str, str]) -> list[int] | None:
    """The GPUs of a task; None = jax's own choice, the one with the task's number on its node.

    A task that has its node to itself takes every GPU that it sees; one that SLURM shows a single GPU, that one.
    """
    if environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else int(environ.get("SLURM_GPUS_ON_NODE", 0))
    alone = environ["SLURM_NTASKS"] == environ.get("SLURM_STEP_NUM_NODES")
    return list(range(count)) if count and alone else [0] if count == 1 else None


def _slurm(environ: Mapping[str, str]) -> dict | None:
    """By a step of several tasks (`srun`)."""
    if not all(environ.get(name) for name in _SLURM) or _number(environ, "SLURM_NTASKS") < 2:
        return None
    return {"cluster_detection_method": "slurm", "local_device_ids": _slurm_devices(environ)}


def _metadata(name: str, environ: Mapping[str, str]) -> str:
    """An attribute of this Google Cloud machine; "" where there is none, or no such machine.

    Asked only where there are TPU chips. No answer is not taken for "there is none": a host that believes itself alone
    would train on its own, and the others would wait for it.

    Raises:
      Transient: no answer in time, or only errors.
    """
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows this machine's metadata
    end = time.monotonic() + _METADATA_WAIT
    while True:
        try:
            with direct.open(request, timeout=_METADATA_TRY) as answer:
                return answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            if _not_there(error):
                return ""
            if time.monotonic() > end:
                raise Transient(
                    f"The metadata server of this TPU host did not say which hosts its slice has: {error}. Start the "
                    "run again; with --distributed=off where the host trains alone or is no machine of Google Cloud."
                ) from error
        time.sleep(1)


def _not_there(error: Exception) -> bool:
    """Whether an error says that there is no such attribute, or no metadata server: its name does not resolve."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code == 404
    reason = getattr(error, "reason", None)
    return isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN  # the resolver itself was not there


def _has_chips(environ: Mapping[str, str]) -> bool:
    """Whether jax will look for a TPU here, by its own signs: chips, libtpu, and JAX_PLATFORMS that allows them."""
    platforms = environ.get("JAX_PLATFORMS")
    if platforms and "tpu" not in platforms.split(","):
        return False
    found = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(found) and importlib.util.find_spec("libtpu") is not None


def _tpu(environ: Mapping[str, str], has_chips: Callable, metadata: Callable) -> dict | None:
    """By a slice of several hosts: what GKE sets in the environment, or a TPU VM's metadata."""
    if not has_chips(environ):
        return None
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    slices = environ.get("MEGASCALE_NUM_SLICES", "")
    if hosts is None and not environ.get("TPU_SKIP_MDS_QUERY"):
        hosts = metadata("worker-network-endpoints", environ)
        for line in metadata("tpu-env", environ).splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "MEGASCALE_NUM_SLICES":
                slices = slices or value.strip().strip("'")
    several = len((hosts or "").split(",")) > 1 or int(slices or 1) > 1
    return {} if several else None  # jax finds the rest by the same signs


def described(
    environ: Mapping[str, str], has_chips: Callable = _has_chips, metadata: Callable = _metadata
) -> dict | None:
    """What `jax.distributed.initialize` is to be told, or None: the environment names no other process.

    Args:
      environ: the variables.
      has_chips: environ -> whether jax will look for a TPU here.
      metadata: (attribute, environ) -> its text on this Google Cloud machine, "" where there is none.

    Raises:
      UserError: some of the JAX_ variables are missing or make no sense.
      Transient: a TPU host whose metadata server does not answer.
    """
    named = _named(environ)
    if named is not None:
        return named
    slurm = _slurm(environ)
    return slurm if slurm is not None else _tpu(environ, has_chips, metadata)


# ------------------------------------------------------------------------------------------------ coming together


def join(mode: str = "auto", timeout: int = WAIT) -> None:
    """Joins the other processes of the run, where there are any. Must come before jax looks for devices.

    Args:
      mode: of MODES. auto: where the environment names others (`described`); on: also where only jax itself may find
        them (Open MPI, say); off: never.
      timeout: seconds to wait for all of them.

    Where not all come in time the process ends, with a sentence and exit code 75.

    Raises:
      UserError: `on`, and nobody knows of any others; the variables make no sense; jax says no (Transient).
    """
    if mode == "off" or jax.distributed.is_initialized():
        return
    arguments = described(os.environ)
    if arguments is None and mode == "auto":
        return
    # jax aborts the process when its own time is up: this ends it first, with a sentence. (It cannot be an exception:
    # the call does not return to this thread.)
    alarm = threading.Timer(timeout, _give_up, (timeout,))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            **(arguments or {}), initialization_timeout=timeout + _LEAVE, shutdown_timeout_seconds=_LEAVE
        )
    except ValueError as error:  # what jax says when it finds no address, number or count
        raise UserError(
            f"Nothing says which processes this run has: set {', '.join(_NAMED)}, or start it without --distributed."
        ) from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise Transient(f"This process could not join the others of the run: {reason}.") from error
    finally:
        alarm.cancel()


def _give_up(timeout: int) -> None:
    _end(f"Not all processes of this run came within {timeout} s: start the same command on every host of it at once.")


def leave(error: Exception) -> None:
    """Takes leave of the others where the run fails here. Returns once all have failed (most mistakes are the same for
    all); where they go on, says the error and ends this process, which ends them: jax would wait, and abort. What
    one process alone meets lies in its host, and may pass: the exit code is 75. Of an error that is no sentence (see
    TOLD) it is 1, after the traceback.

    Raises:
      SystemExit: all have failed, and the traceback of the error has been printed.
    """
    if not jax.distributed.is_initialized():
        return
    told = isinstance(error, TOLD)
    if not told:  # now: whoever ends first takes the others with it
        traceback.print_exception(error)
        sys.stderr.flush()
    leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    leaving.start()
    leaving.join(_LEAVE / 3)
    if leaving.is_alive():
        if told:
            _end(
                f"{sentence(error)} (The other processes of the run did not meet this mistake; they end with this one.)"
            )
        _end(f"This process failed by a {type(error).__name__}, see above; the others of the run end with it.", 1)
    if not told:
        raise SystemExit(1)


def _end(what: str, code: int = TEMPORARY) -> None:
    print(f"lwd: {what}", file=sys.stderr, flush=True)
    os._exit(code)


# ------------------------------------------------------------------------------------------------ agreeing


def agree(text: str, mistake: str) -> None:
    """Compares a text between the processes, each of which must call this.

    Raises:
      UserError: `mistake`, on every process, where the texts are not all the same.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    everyone = multihost_utils.process_allgather(digest)
    if (everyone != everyone[0]).any():
        raise UserError(mistake)


def verdict(wrong: str) -> str:
    """What process 0 found wrong, for every process, each of which must call this: its words there, that it did on the
    others; "" where it found nothing.
    """
    if jax.process_count() == 1:
        return wrong
    found = multihost_utils.broadcast_one_to_all(np.asarray(jax.process_index() == 0 and bool(wrong)))
    return wrong or ("process 0 found it so" if found else "")


def summed(count: int) -> int:
    """The sum of what the processes counted; each must call this, and waits for the step on its way."""
    return count if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.asarray(count)).sum())


def check_shared(folder: Path) -> None:
    """Checks that a folder is the same one for all processes, each of which must call this.

    Raises:
      UserError: on every process, where one does not see what process 0 writes there.
    """
    if jax.process_count() == 1:
        return
    name = int(multihost_utils.broadcast_one_to_all(np.asarray(secrets.randbits(31), np.int32)))
    file = folder / f".shared-{name}"
    if jax.process_index() == 0:
        file.touch()
    multihost_utils.sync_global_devices("written to the shared folder")
    end = time.monotonic() + _SEEN_WAIT
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.5)
    seen = multihost_utils.process_allgather(np.asarray(file.exists()))
    if jax.process_index() == 0:
        file.unlink()
    if not seen.all():
        raise UserError(
            f"{folder} is not the same folder for all {jax.process_count()} processes: the workdir must be one that "
            "they share."
        )
