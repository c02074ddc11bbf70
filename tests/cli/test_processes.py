"""Runs of several processes: who the environment says they are, and that they train as one process does.

Parameters are compared to 1e-5 and not bit for bit: gloo adds the parts of a gradient up in another order than a single
process does.
"""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from compiling import QUICKLY
from full_disk import full_disk
from PIL import Image
from tiny_models import SMALL_KL, autoencoder, write_inputs

from lwd_jax.autoencoders import save_autoencoder
from lwd_jax.cli import main
from lwd_jax.config import load_config
from lwd_jax.data import dataset
from lwd_jax.data.dataset import find_pictures, write_dataset
from lwd_jax.errors import Transient, UserError, exit_code
from lwd_jax.files import locked
from lwd_jax.parallel import processes
from lwd_jax.train import metrics
from lwd_jax.train.checkpoint import DAMAGED, read_params, saved_steps
from lwd_jax.train.loop import run
from lwd_jax.train.setup import make_setup

TRAIN = Path(__file__).parents[1] / "train"
sys.path.append(str(TRAIN))
from toy_worker import toy_run  # noqa: E402

# ------------------------------------------------------------------------------------------ what the environment says

NAMED = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4",
}  # fmt: skip


def described(environ, chips=False, **metadata):
    def answer(name, _):
        return metadata.get(name.replace("-", "_"), "")

    return processes.described(environ, has_chips=lambda _: chips, metadata=answer)


def test_nothing_said_is_one_process():
    assert described({}) is None
    assert described(SLURM | {"SLURM_NTASKS": "1"}) is None
    assert described({name: SLURM[name] for name in SLURM if name != "SLURM_STEP_NODELIST"}) is None  # no step of srun
    assert described({}, chips=True, worker_network_endpoints="a:b:10.0.0.1") is None
    assert described({}, chips=True) is None
    assert described({"TPU_WORKER_HOSTNAMES": "a,b"}) is None  # and no chips


def test_variables_name_the_processes():
    found = described(NAMED | SLURM, chips=True, worker_network_endpoints="a,b")
    assert found == {
        "coordinator_address": "host:1234", "num_processes": 4, "process_id": 3,
        "cluster_detection_method": "deactivate",
    }  # fmt: skip


def test_a_task_of_slurm_takes_the_gpus_of_its_node():
    def devices(**changed):
        found = described(SLURM | changed)
        assert found["cluster_detection_method"] == "slurm"
        return found["local_device_ids"]

    assert devices() == [0, 1, 2, 3]  # alone on its node
    assert devices(CUDA_VISIBLE_DEVICES="2,5") == [0, 1]
    assert devices(SLURM_STEP_NUM_NODES="1") is None  # jax's rule: one device a task
    assert devices(SLURM_STEP_NUM_NODES="1", CUDA_VISIBLE_DEVICES="2") == [0]
    assert devices(JAX_LOCAL_DEVICE_IDS="1") is None
    assert described(SLURM | {"JAX_COORDINATOR_ADDRESS": "other:1"})["cluster_detection_method"] == "slurm"


def test_hosts_of_a_tpu_slice_are_processes():
    assert described({}, chips=True, worker_network_endpoints="a:b:10.0.0.1,a:c:10.0.0.2") == {}
    assert described({"TPU_WORKER_HOSTNAMES": "a,b"}, chips=True) == {}
    assert described({"TPU_WORKER_HOSTNAMES": "a"}, chips=True, worker_network_endpoints="a,b") is None
    assert described({}, chips=True, worker_network_endpoints="a", tpu_env="X: 'y'\nMEGASCALE_NUM_SLICES: '2'\n") == {}
    assert described({"TPU_SKIP_MDS_QUERY": "1"}, chips=True, worker_network_endpoints="a,b") is None


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"JAX_PROCESS_ID": ""}, "not JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "4"}, "has 0 to 3"),
        ({"JAX_NUM_PROCESSES": "four"}, "whole number, but it is 'four'"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "HOST:PORT"),
    ],
)
def test_variables_that_make_no_sense_are_mistakes(changed, words):
    with pytest.raises(UserError, match=words):
        described(NAMED | changed)


@pytest.fixture
def metadata(monkeypatch):
    """A server of metadata that plays `answers`, each a code or seconds of waiting; the last goes on."""
    answers = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            code = answers.pop(0) if len(answers) > 1 else answers[0]
            if isinstance(code, float):
                time.sleep(code)
                code = 200
            self.send_response(code)
            self.end_headers()
            self.wfile.write(b"a:b:10.0.0.1,a:c:10.0.0.2" if "endpoints" in self.path else b"")

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):  # of a connection whose other end did not wait
            pass

    server = Server(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(processes, "_METADATA_WAIT", 2)
    monkeypatch.setattr(processes, "_METADATA_TRY", 0.5)

    def described(*given):
        answers[:] = given
        address = f"127.0.0.1:{server.server_port}"
        return processes.described({"GCE_METADATA_IP": address}, has_chips=lambda _: True)

    yield described
    server.shutdown()


@pytest.mark.parametrize("answers", [(200,), (503, 200), (1.0, 200), (0.2,)])
def test_a_tpu_host_waits_for_slow_and_failing_metadata(metadata, answers):
    assert metadata(*answers) == {}


def unresolved(monkeypatch, number):
    def refuse(*_, **__):
        raise socket.gaierror(number, "the name does not resolve")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return processes.described({}, has_chips=lambda _: True)


def test_a_tpu_host_without_such_metadata_is_alone(metadata, monkeypatch):
    assert metadata(404) is None
    assert unresolved(monkeypatch, socket.EAI_NONAME) is None
    with pytest.raises(Transient):  # nobody answered what the name is
        unresolved(monkeypatch, socket.EAI_AGAIN)


@pytest.mark.parametrize("answer", [503, 403, 30.0])
def test_a_tpu_host_whose_metadata_fails_does_not_believe_itself_alone(metadata, answer):
    with pytest.raises(Transient, match="did not say which hosts its slice has: "):
        metadata(answer)


# ------------------------------------------------------------------------------------------------- several processes


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(root, command, count, only=None):
    """The processes of one run, one device each, or `only` one of them; compiling as little as can be."""
    port = free_port()
    started = []
    for number in range(count) if only is None else [only]:
        environ = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {QUICKLY}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(number),
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen([sys.executable, *map(str, command)], env=environ, **pipes))
    return started


def ended(started, code=0):
    """What each printed; all must end with the code."""
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [code] * len(started), "\n".join(said)
    return said


def assert_same_params(workdir, other):
    (params, _, step), (others, _, other_step) = read_params(workdir), read_params(other)
    assert step == other_step
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, others)


def assert_same_metrics(workdir, other):
    lines, others = metrics.read(workdir), metrics.read(other)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for name in ("loss", "grad_norm", "learning_rate"):
        np.testing.assert_allclose([line[name] for line in lines], [line[name] for line in others], rtol=1e-5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_stays_alone_says_so(root, number):
    code = "from lwd_jax.parallel import processes; processes.join(timeout=2)"
    (said,) = ended(start(root, ["-c", code], 2, only=number), 75)
    assert said.strip() == (
        "lwd: Not all processes of this run came within 2 s: start the same command on every host of it at once."
    )


FAILING = """
import sys, jax
from lwd_jax.cli import main, train
from lwd_jax.errors import UserError
from lwd_jax.parallel import processes
def fail(config, workdir):
    if jax.process_index() == 1 or {both}: raise {error}
    processes.agree("", "")  # waits for the other
train.train, train.read_config, processes._LEAVE = fail, lambda *_: None, 6
sys.exit(main(["train", "--config=x", "--workdir=x"]))
"""


def failing(root, error, both=False):
    """(code, what it printed) of two processes, of which one alone meets the error, or both."""
    started = start(root, ["-c", FAILING.format(error=error, both=both)], 2)
    said = [process.communicate(timeout=300)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_a_mistake_of_one_process_alone_is_temporary(root):
    (code, _), (other, said) = failing(root, "UserError('The dataset is not there.')")
    assert code not in (0, 2) and other == 75
    assert "lwd: The dataset is not there. (The other processes of the run did not meet this" in said


def test_an_error_of_the_disk_of_one_process_is_its_last_word(root):
    (code, _), (other, said) = failing(root, "OSError(5, 'Input/output error', '/mnt/bucket/x')")
    assert code not in (0, 2) and other == 75
    assert said.splitlines()[-1].startswith("lwd: /mnt/bucket/x: Input/output error. (The other processes"), said


def test_a_defect_met_by_one_process_is_its_last_word(root):
    (code, _), (other, said) = failing(root, "RuntimeError('boom')")
    assert code not in (0, 2) and other == 1
    assert said.count("RuntimeError: boom") == 1 and "Check failure" not in said
    assert said.splitlines()[-1].startswith("lwd: This process failed by a RuntimeError, see above"), said


@pytest.mark.parametrize("error, code", [("OSError(5, 'Input/output error', 'x')", 75), ("RuntimeError('boom')", 1)])
def test_an_error_met_by_all_processes_ends_each_at_once(root, error, code):
    for found, said in failing(root, error, both=True):
        assert found == code and "did not meet" not in said and "Check failure" not in said, said
        assert said.count("boom" if code == 1 else "lwd: x: Input/output error.") == 1


def test_a_checkpoint_that_cannot_be_written_is_temporary(tmp_path):
    with full_disk(9_000), pytest.raises(UserError, match="could not be written to") as caught:
        toy_run(tmp_path, 2, devices=jax.devices()[:1])
    assert exit_code(caught.value) == 75


@pytest.fixture(scope="module")
def stage1(root):
    """The config file of a small run of stage 1."""
    (root / "images").mkdir()
    random = np.random.default_rng(0)
    for i in range(9):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / "images" / f"{i}.png")
    paths = find_pictures(root / "images")
    standardise, torn = dataset.standardise, [path.read_bytes() for path in paths[3:5]]  # one may be held out

    def standard_or_torn(data):
        standard = standardise(data)
        return standard._replace(data=data[:60]) if data in torn else standard

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "standardise", standard_or_torn)
        write_dataset(root / "dataset", root / "images", paths, [("",)] * 9, lambda *_: None)
    save_autoencoder(root / "vae", *autoencoder(0, SMALL_KL))
    config = {
        "stage": 1,
        "resolution": 16,
        "dtype": "float32",
        "remat": "none",
        "models": {"autoencoder": f"{root}/vae", "autoencoder_variant": ""},
        "data": {"dataset": f"{root}/dataset", "batch_size": 4, "workers": 0, "held_out": 1, "buckets": False},
        "reconstruction": {"lpips": 0.0, "alpha": 0.0},
        # Few parameters train: their updates take longest to compile. A large eps: Adam's own blows the rounding
        # of gradients that are nearly 0 up to its full step.
        "optimizer": {"learning_rate": 1e-3, "warmup": 1, "eps": 1e-2, "train_only": ["conv_in"]},
        "training": {"steps": 4, "ema": 0.9, "log_every": 1, "save_every": 2, "preview_every": 0},
    }
    (root / "stage1.json").write_text(json.dumps(config))
    return root / "stage1.json"


def test_an_address_that_cannot_be_opened_is_no_workdir(stage1, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"--config={stage1}", "--workdir=s3://bucket/run"]) == 2
    assert "'s3://bucket/run' is no address that can be opened" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.heavy
def test_lwd_train_by_two_processes_is_one_run(root, stage1, tmp_path):
    config = load_config(json.loads(stage1.read_text()))
    setup = make_setup(config, jax.devices()[:2])
    alone = (setup.program, setup.batches, config, tmp_path / "alone", setup.mesh)
    run(*alone, description=setup.description, params=setup.params)
    command = ["-m", "lwd_jax.cli", "train", f"--config={stage1}", f"--workdir={tmp_path / 'two'}"]
    said = ended(start(root, command, 2))
    assert "Trained to step 4" in said[0] and "Trained" not in said[1]
    assert_same_params(tmp_path / "two", tmp_path / "alone")
    assert_same_metrics(tmp_path / "two", tmp_path / "alone")
    counts = [[line["replaced_pictures"] for line in metrics.read(tmp_path / name)] for name in ("two", "alone")]
    assert counts[0] == counts[1] and counts[0][-1] >= 2
    files = {path.name for path in (tmp_path / "two").iterdir()}
    assert files == {path.name for path in (tmp_path / "alone").iterdir()}


def test_two_processes_preview_what_one_does(tmp_path):
    """Stage 2: every process computes its part of the samples and of the held-out loss; process 0 writes them."""
    write_inputs(tmp_path)
    config = {
        "stage": 2,
        "resolution": 32,
        "dtype": "float32",
        "remat": "none",
        "models": {"autoencoder": "vae", "autoencoder_variant": "", "backbone": "transformer", "backbone_variant": ""},
        "data": {"latents": f"{tmp_path}/latents", "batch_size": 2, "workers": 0, "held_out": 3, "buckets": False},
        "optimizer": {"learning_rate": 1e-3, "warmup": 1, "eps": 1e-2, "train_only": ["final_proj"]},
        "training": {"steps": 1, "ema": 0.9, "log_every": 1, "preview_every": 1},
        "sampling": {"steps": 2, "guidance": 2.0},
    }
    config["models"] |= {name: f"{tmp_path}/{config['models'][name]}" for name in ("autoencoder", "backbone")}
    file = tmp_path / "stage2.json"
    file.write_text(json.dumps(config))
    one, two = (["-m", "lwd_jax.cli", "train", f"--config={file}", f"--workdir={tmp_path / name}"] for name in "12")
    alone = start(tmp_path, one, 1)
    ended(start(tmp_path, two, 2))
    ended(alone)
    shown, others = (
        [{name: line[name] for name in line if name.startswith("preview/")} for line in metrics.read(run)]
        for run in (tmp_path / "1", tmp_path / "2")
    )
    assert [len(line) for line in shown] == [4, 0, 4]
    assert all(line == pytest.approx(other, rel=1e-4) for line, other in zip(shown, others, strict=True))
    names = {"saliency_and_mask.png", "step_000000_samples.png", "step_000001_samples.png"}
    for name in names:
        pixels, other = (np.asarray(Image.open(tmp_path / run / "previews" / name), int) for run in "12")
        assert abs(pixels - other).max() <= 2  # of 255: rounding
    assert names == {path.name for path in (tmp_path / "2" / "previews").iterdir()}


def test_a_workdir_that_is_taken_is_told_to_all_processes(root, stage1, tmp_path):
    (tmp_path / "run").mkdir()
    command = ["-m", "lwd_jax.cli", "train", f"--config={stage1}", f"--workdir={tmp_path / 'run'}"]
    with locked(tmp_path / "run", "It"):
        said = ended(start(root, command, 2), 2)
    for each, why in zip(said, ("it is being written to by another process", "process 0 found it so")):
        assert each.splitlines()[-1].startswith(f"lwd: {tmp_path / 'run'} is not this run's to write to: {why}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.slow
def test_four_two_and_one_process_go_on_with_each_others_runs(root, tmp_path):
    """Four processes; two, whose newest checkpoint is damaged, and one of which is told to stop; then one."""
    workdir, alone = tmp_path / "run", tmp_path / "alone"
    ended(start(root, [TRAIN / "toy_worker.py", workdir, 4, 2], 4))
    toy_run(alone, 4, devices=jax.devices()[:1])
    assert saved_steps(workdir) == [2, 4]
    assert_same_params(workdir, alone)
    assert_same_metrics(workdir, alone)

    torn = next(path for path in (workdir / "checkpoints" / "4" / "params").rglob("*") if path.stat().st_size > 100)
    torn.write_bytes(bytes(torn.stat().st_size))
    two = start(root, [TRAIN / "toy_worker.py", workdir, 100_000, 100_000], 2)
    while not any(line["step"] >= 6 for line in metrics.read(workdir)):
        assert all(process.poll() is None for process in two), ended(two)
        time.sleep(0.05)
    two[1].send_signal(signal.SIGTERM)
    said = ended(two, 128 + signal.SIGTERM)
    step = saved_steps(workdir)[-1]
    assert all(f"reached {step}" in each for each in said)
    assert sorted(path.name for path in (workdir / DAMAGED).iterdir()) == ["4.0", "4.0.txt"]
    toy_run(alone, step, devices=jax.devices()[:1])
    assert_same_params(workdir, alone)
    assert_same_metrics(workdir, alone)


@pytest.mark.heavy
def test_processes_that_do_not_share_a_workdir_are_told(root, tmp_path):
    code = (
        "import sys; from pathlib import Path; import jax; from lwd_jax.parallel import processes as p\n"
        "p._SEEN_WAIT = 1; p.join(timeout=60); mine = Path(sys.argv[1]) / str(jax.process_index()); mine.mkdir()\n"
        "for check in (lambda: p.check_shared(mine), lambda: p.agree(mine.name, 'not the same')):\n"
        "    try: check()\n"
        "    except ValueError as mistake: print('mistake:', mistake)\n"
        "p.check_shared(mine.parent); p.agree('same', 'not the same')\n"
        "p.leave(p.UserError('met by all')); print('left')"
    )
    for said in ended(start(root, ["-c", code, tmp_path], 2)):
        found = [line for line in said.splitlines() if line.startswith("mistake:")]
        assert said.splitlines()[-1] == "left" and len(found) == 2
        assert "not the same folder for all 2 processes" in found[0] and "not the same" in found[1]
    assert not list(tmp_path.rglob(".shared*"))
