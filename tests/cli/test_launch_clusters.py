"""The cluster launchers, with stand-ins for gcloud, kubectl and SLURM that record their words: every argument arrives
as it was given, preemption makes a new slice so many times, --dry_run runs nothing.

The stand-in for `gcloud ... ssh` has a shell read --command, in a folder for each worker, as sshd would.
"""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
HOSTILE = [
    "--config=configs/two words.py", "it's \"quoted\"", "$(touch pwned)", "`touch pwned`", "line\nbreak", "back\\slash",
    "*", "", "; touch pwned &", "a && touch pwned | cat", "~", "$HOME", "$$", "$(HOME)", "ünïcode", "tab\there", "%s",
    "!!", "--", "#x", "\\n", "{a,b}",
]  # fmt: skip
GCLOUD = """
import contextlib, json, os, pathlib, shutil, signal, subprocess, sys
fake, words = pathlib.Path(os.environ["FAKE"]), sys.argv[1:]
with open(fake / "gcloud", "a") as file:
    file.write(json.dumps(words) + "\\n")
state, kind, verb = fake / "state", words[2], words[3]
value = {w.partition("=")[0]: w.partition("=")[2] for w in words if w.startswith("--")}
workers = [fake / f"worker{i}" for i in range(2)]
chosen = workers if value.get("--worker") == "all" else workers[:1]
failing = fake / f"failing.{verb}"  # how many of the next calls fail
if failing.exists() and (left := int(failing.read_text())):
    failing.write_text(str(left - 1))
    sys.exit(f"ERROR: (gcloud.compute.tpus.{kind}.{verb}) UNAVAILABLE: The service is currently unavailable.")
if verb == "create":
    if state.exists():
        sys.exit("ERROR: ALREADY_EXISTS")
    state.write_text("READY")
    [worker.mkdir() for worker in workers]
    sys.exit((fake / "answers.lost").exists() and "ERROR: DEADLINE_EXCEEDED")
elif verb == "delete":
    state.unlink()
    for worker in workers:  # what runs there ends with it
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.killpg(int((worker / "lwd_jax/run.pid").read_text()), signal.SIGKILL)
        shutil.rmtree(worker)
elif verb == "describe":
    if not state.exists():
        sys.exit(f"ERROR: (gcloud.compute.tpus.{kind}.describe) NOT_FOUND: Resource 'a' was not found")
    found = state.read_text()
    print({"READY": "ACTIVE", "PREEMPTED": "SUSPENDED"}[found] if kind == "queued-resources" else found)
elif state.read_text() != "READY":
    sys.exit(255)
elif verb == "scp":
    [shutil.copy(words[4], worker / words[5].partition(":")[2]) for worker in chosen]
elif verb == "ssh":
    sys.exit(max(subprocess.run(["bash", "-c", value["--command"]], cwd=worker).returncode for worker in chosen))
"""
RECORD = """
import json, os, pathlib, sys
name, fake = pathlib.Path(sys.argv[0]).name, pathlib.Path(os.environ["FAKE"])
given = "" if sys.stdin.isatty() or name != "kubectl" else sys.stdin.read()
with open(fake / name, "a") as file:
    file.write(json.dumps({"words": sys.argv[1:], "stdin": given, "flags": os.environ.get("XLA_FLAGS", "")}) + "\\n")
sys.exit(int(os.environ.get(f"{name}_CODE", 0)))
"""
# `python3 -m venv FOLDER` puts this lwd into it: it notes its words and flags, waits for the other worker as
# jax.distributed would, and plays the next word of the file `plays`: A/B is an exit code for each worker. The flags of
# a kind are its name.
LWD = """
import json, os, pathlib, sys, time
if sys.argv[1] == "plan":
    sys.exit(print(*sys.argv[2:]))
fake, worker = pathlib.Path(os.environ["FAKE"]), pathlib.Path.cwd().parent.name
(fake / f"flags.{worker}").write_text(os.environ.get("LIBTPU_INIT_ARGS", ""))
log = fake / f"lwd.{worker}"
turn = len(log.read_text().splitlines()) if log.exists() else 0
with open(log, "a") as file:
    file.write(json.dumps([os.environ["JAX_COMPILATION_CACHE_DIR"], *sys.argv[1:]]) + "\\n")
print(f"{worker} turn {turn}\\n    @     0x7f96cee709  absl::PThread::ThreadFn()", flush=True)
other = {"worker0": "worker1", "worker1": "worker0"}.get(worker, worker)  # a pod starts alone
for _ in range(6000):
    if (fake / f"lwd.{other}").exists() and len((fake / f"lwd.{other}").read_text().splitlines()) > turn:
        break
    time.sleep(0.01)
play = (fake / "plays").read_text().split()[turn].split("/")[-1 if worker == "worker1" else 0]
if play == "preempted":
    (fake / "state").write_text("PREEMPTED")
    sys.exit(143)
sys.exit(int(play))
"""
PYTHON = """
import os, pathlib, shutil, sys
if "venv" in sys.argv:
    (folder := pathlib.Path(sys.argv[-1]) / "bin").mkdir(parents=True)
    for name, source in (("python", "python3"), ("lwd", "lwd")):
        shutil.copy(pathlib.Path(os.environ["FAKE"]) / "bin" / source, folder / name)
elif "--version" in sys.argv:
    print("Python 3.11.0")
elif "install" in sys.argv:
    fixed = os.environ.get("PIP_CONSTRAINT", "")
    with open(pathlib.Path(os.environ["FAKE"]) / "pip", "a") as file:
        file.write((pathlib.Path(fixed).read_text() if fixed else "newest") + "\\n")
elif "freeze" in sys.argv:
    print("jax==0.0.1")
"""


@pytest.fixture
def fake(tmp_path):
    """Programs that stand in for others, in front of the path; `fake / NAME` is what they were told."""
    (tmp_path / "bin").mkdir()
    programs = dict.fromkeys(("sudo", "gcsfuse", "mountpoint", "kubectl", "sbatch", "srun", "scontrol"), RECORD)
    programs |= {"gcloud": GCLOUD, "lwd": LWD, "python3": PYTHON}
    for name, text in programs.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!{sys.executable} -IS\n{text}")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "plays").write_text("0\n" * 9)
    return tmp_path


def launch(fake, script, *words, code=0, **variables):
    environ = os.environ | {"FAKE": str(fake), "PATH": f"{fake}/bin:{os.environ['PATH']}", "USER": "me"} | variables
    environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # which would go before the workdir's
    ran = subprocess.run(
        ["bash", str(LAUNCH / script), *words], cwd=fake, env=environ, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == code, ran.stdout + ran.stderr
    assert not list(fake.rglob("pwned"))
    return ran.stdout + ran.stderr


def told(fake, name):
    file = fake / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def verbs(fake):
    """The gcloud commands that change something."""
    return [f"{words[2]} {words[3]}" for words in told(fake, "gcloud") if words[3] in ("create", "delete")]


TPU = ("--name", "a", "--zone", "z", "--type", "v5litepod-8", "--workdir", "my run", "--poll", "0")


def test_a_slice_is_made_and_every_worker_gets_every_word(fake):
    said = launch(fake, "tpu_run.sh", *TPU, "--project", "my project", "--", *HOSTILE, LIBTPU_INIT_ARGS="--mine=1")
    for worker in ("worker0", "worker1"):
        assert (fake / f"flags.{worker}").read_text() == "--flags v5litepod-8 --mine=1"
        words = ["train", "--workdir=my run", *HOSTILE]
        assert told(fake, f"lwd.{worker}") == [["my run/compiled", *words]]
    assert "worker0 turn 0" in said and "worker1 turn" not in said and "still there" in said
    calls = told(fake, "gcloud")
    assert verbs(fake) == ["tpu-vm create"]
    assert all({"--zone=z", "--project=my project"} <= set(words) for words in calls)
    created = next(words for words in calls if words[3] == "create")
    assert "--accelerator-type=v5litepod-8" in created and "--version=v2-alpha-tpuv5-lite" in created
    assert "--spot" not in created


def test_a_preempted_slice_is_made_again_and_the_run_goes_on(fake):
    (fake / "plays").write_text("preempted preempted 0")
    options = ("--spot", "--queued", "--bucket", "my bucket", "--fetch", str(fake / "mine"), "--delete")
    (workdir := fake / "shared run").mkdir()
    (workdir / "metrics.jsonl").write_text("{}")
    said = launch(fake, "tpu_run.sh", *TPU, "--workdir", str(workdir), *options, "--", *HOSTILE, mountpoint_CODE="1")
    assert told(fake, "gcsfuse")[0]["words"] == ["--implicit-dirs", "my bucket", "/mnt/bucket"]
    assert verbs(fake) == ["queued-resources create", "queued-resources delete"] * 3
    assert "making it again (2 of 10)" in said and len(told(fake, "lwd.worker1")) == 3
    assert {tuple(words) for words in told(fake, "lwd.worker0")} == {
        (f"{workdir}/compiled", "train", f"--workdir={workdir}", *HOSTILE)
    }
    assert all("--spot" in words for words in told(fake, "gcloud") if words[3] == "create")
    assert (fake / "mine" / "metrics.jsonl").read_text() == "{}"
    # The first installs what is newest, whoever comes after it, on this slice or the next, the same.
    assert (fake / "pip").read_text().split() == ["newest"] + ["jax==0.0.1"] * 5


def test_a_slice_that_is_there_installs_what_another_run_began_with(fake):
    """What is there already was installed for the first run."""
    for worker in ("worker0", "worker1"):
        (kept := fake / worker / "lwd_jax/second/packages.txt").parent.mkdir(parents=True)
        kept.write_text("jax==0.0.2\n")
    (fake / "state").write_text("READY")
    for workdir in ("first", "second", "second", "third"):
        launch(fake, "tpu_run.sh", *TPU, "--workdir", workdir, "--", *HOSTILE)
    assert verbs(fake) == [] and (fake / "worker0/lwd_jax/third/packages.txt").is_file()
    assert (fake / "pip").read_text().split() == ["newest"] * 2 + ["jax==0.0.2"] * 2 + ["newest"] * 2


def test_preemption_ends_after_so_many_times(fake):
    (fake / "plays").write_text("preempted " * 9)
    said = launch(fake, "tpu_run.sh", *TPU, "--retries", "1", "--", *HOSTILE, code=2)
    assert verbs(fake) == ["tpu-vm create", "tpu-vm delete", "tpu-vm create"]
    assert said.splitlines()[-1] == "tpu_run.sh: a was preempted 2 times; the same command resumes the run."


@pytest.mark.parametrize("code", [1, 2, 143])
def test_a_run_that_fails_on_a_sound_slice_is_not_repeated(fake, code):
    (fake / "plays").write_text(f"{code} 0")
    launch(fake, "tpu_run.sh", *TPU, "--", *HOSTILE, code=code)
    assert verbs(fake) == ["tpu-vm create"] and len(told(fake, "lwd.worker0")) == 1


@pytest.mark.parametrize(
    "plays, code, shown",
    [("134/1", 134, True), ("1/1", 1, True), ("0/75", 0, False), ("2/1", 2, False), ("143/143", 143, False)],
)
def test_the_last_words_of_every_worker_are_shown_where_one_failed(fake, plays, code, shown):
    (fake / "plays").write_text(plays)
    said = launch(fake, "tpu_run.sh", *TPU, "--", *HOSTILE, code=code)
    host = socket.gethostname()
    assert (f"{host}: worker1 turn 0\n" in said) == shown and f"{host}:     @" not in said


@pytest.mark.parametrize("plays, code, starts", [
    ("75 134/75 0", 0, 3), ("75/1 75 75", 75, 3), ("75/2 0", 2, 1), ("134/137 0", 134, 1),
])  # fmt: skip
def test_a_failure_that_may_pass_has_the_run_started_again(fake, plays, code, starts):
    """Whichever worker met it: those it took with it end by an abort."""
    (fake / "plays").write_text(plays)
    said = launch(fake, "tpu_run.sh", *TPU, "--retries", "2", "--", *HOSTILE, code=code)
    assert verbs(fake) == ["tpu-vm create"]
    assert [len(told(fake, f"lwd.worker{i}")) for i in range(2)] == [starts, starts]
    assert said.count("starting it again") == starts - 1
    assert ": worker1 turn" in said  # why: worker 0 is not the one that knows


def test_a_worker_that_goes_on_is_stopped(fake, checkout):
    worker = str(checkout / "launch" / "tpu_worker.sh")
    going = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (checkout / "run.pid").write_text(str(going.pid))
    threading.Thread(target=going.wait, daemon=True).start()
    launch(fake, worker, "stop")
    assert going.wait(10) == -signal.SIGTERM


def test_a_slice_that_is_there_is_used(fake):
    (fake / "state").write_text("READY")
    for worker in ("worker0", "worker1"):
        (fake / worker).mkdir()
    (fake / "failing.describe").write_text("3")  # which does not say that it is not there
    launch(fake, "tpu_run.sh", *TPU, "--delete", "--", *HOSTILE)
    assert verbs(fake) == ["tpu-vm delete"] and len(told(fake, "lwd.worker1")) == 1


@pytest.mark.parametrize("queued", [(), ("--queued",)])
def test_a_slice_that_nobody_tells_of_is_not_made(fake, queued):
    (fake / "failing.describe").write_text("99")
    said = launch(fake, "tpu_run.sh", *TPU, *queued, "--", *HOSTILE, code=2)
    assert verbs(fake) == [] and "UNAVAILABLE" in said and "does not say whether a is there" in said.splitlines()[-1]


def test_a_slice_that_is_there_after_create_failed_is_used(fake):
    (fake / "answers.lost").touch()
    said = launch(fake, "tpu_run.sh", *TPU, "--", *HOSTILE)
    assert "DEADLINE_EXCEEDED" in said and len(told(fake, "lwd.worker1")) == 1


def test_a_slice_that_cannot_be_made_ends_the_launch(fake):
    (fake / "failing.create").write_text("1")
    said = launch(fake, "tpu_run.sh", *TPU, "--", *HOSTILE, code=2)
    assert said.splitlines()[-1] == "tpu_run.sh: gcloud could not make a." and verbs(fake) == ["tpu-vm create"]


def test_a_run_has_ended_when_it_says_so(fake, checkout):
    """Though its number is still there: process 1 of a container may never ask for the dead."""
    (checkout / "run.pid").write_text(str(os.getpid()))
    (checkout / "run.log").write_text("the last line\n")
    worker = str(checkout / "launch" / "tpu_worker.sh")
    assert launch(fake, worker, "status") == "running\n"
    (checkout / "run.ended").write_text("2\n")
    assert launch(fake, worker, "status") == "2\n" and launch(fake, worker, "follow") == "the last line\n"


def words_of(line, fake):
    """What a shell makes of a printed command."""
    script = f"printf '%s\\0' {line}"
    return subprocess.run(["bash", "-c", script], cwd=fake, capture_output=True, text=True).stdout.split("\0")[:-1]


def test_a_dry_run_prints_every_command_and_runs_none(fake):
    said = launch(fake, "tpu_run.sh", *TPU, "--dry_run", "--fetch", "mine", "--delete", "--", *HOSTILE)
    assert not told(fake, "gcloud") and not (fake / "mine").exists()
    commands = [words_of(line, fake) for line in said.splitlines()]
    known = [words[4] for words in commands if words[0] == "gcloud"]
    assert known == ["describe", "create", "scp", *["ssh"] * 5, "delete"]  # setup, start, follow, status, fetch
    start = next(words for words in commands if "start" in words[-1])
    remote = next(word for word in start if word.startswith("--command=")).removeprefix("--command=")
    assert words_of(remote, fake)[-len(HOSTILE) :] == HOSTILE


@pytest.mark.parametrize(
    "words, message",
    [
        (("--name", "a"), "--zone is missing"),
        ((*TPU, "--config=x"), "no option '--config=x'"),
        ((*TPU, "--type", "v4-8"), "--runtime"),
        ((*TPU, "--retries", "many"), "whole numbers"),
        (("--name",), "--name needs a value"),
    ],
)
def test_mistakes_of_launching_are_one_sentence(fake, words, message):
    said = launch(fake, "tpu_run.sh", *words, code=2)
    assert message in said and len(said.splitlines()) == 1 and not told(fake, "gcloud")


# ------------------------------------------------------------------------------------------------------- JobSet

JOBSET = ("--name", "a", "--image", "i", "--accelerator", "tpu-v5-lite-podslice", "--topology", "4x4")


def expanded(word):
    """A word of a pod's command, as Kubernetes hands it on: $(NAME) is a variable, $$ a dollar."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda found: "$" if found.group() == "$$" else "EXPANDED", word)


def in_a_pod(fake, command):
    """What lwd is told by a command, in a pod that sets flags of its own."""
    (pod := fake / "pods" / "a").mkdir(parents=True)
    mine = {"FAKE": str(fake), "PATH": f"{fake}/bin:{os.environ['PATH']}", "LIBTPU_INIT_ARGS": "--mine=1"}
    subprocess.run(command, cwd=pod, env=os.environ | mine | {"JAX_COMPILATION_CACHE_DIR": ""}, check=True)
    assert not list(pod.iterdir())
    return told(fake, "lwd.pods")[0][1:]


def test_a_jobset_carries_every_word(fake):
    yaml = pytest.importorskip("yaml")
    options = ("--workdir", "/mnt/bucket/it's", "--slices", "2", "--spot", "--retries", "3", "--bucket", "my-bucket")
    launch(fake, "gke_jobset.sh", *JOBSET, *options, "--namespace", "ns", "--", *HOSTILE, "\x01\x1b\x7f&")
    (call,) = told(fake, "kubectl")
    assert call["words"] == ["apply", "--namespace=ns", "--filename=-"]
    found = yaml.safe_load(call["stdin"])
    assert found["kind"] == "JobSet" and found["spec"]["failurePolicy"]["maxRestarts"] == 3
    (group,) = found["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (group["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 4, 4, 0)
    words = [expanded(word) for word in container["args"]]
    assert words == ["--workdir=/mnt/bucket/it's", "--join_timeout=1800", *HOSTILE, "\x01\x1b\x7f&"]
    assert in_a_pod(fake, [expanded(word) for word in container["command"]] + words) == ["train", *words]
    assert (fake / "flags.pods").read_text() == "--flags tpu-v5-lite-podslice --mine=1"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["env"] == [{"name": "JAX_COMPILATION_CACHE_DIR", "value": "/mnt/bucket/it's/compiled"}]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"shm": "/dev/shm", "bucket": "/mnt/bucket"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shm"] == {"name": "shm", "emptyDir": {"medium": "Memory"}}
    assert volumes["bucket"]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket" and len(volumes) == 2
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]


def test_a_dry_jobset_is_printed_only(fake):
    yaml = pytest.importorskip("yaml")
    said = launch(fake, "gke_jobset.sh", *JOBSET, "--workdir", "w", "--dry_run", "--", *HOSTILE)
    found = yaml.safe_load(said)
    assert found["metadata"]["name"] == "a" and not told(fake, "kubectl")
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["volumes"] == [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    assert pod["containers"][0]["volumeMounts"] == [{"name": "shm", "mountPath": "/dev/shm"}]
    said = launch(fake, "gke_jobset.sh", *JOBSET, "--workdir", "w", "--chips", "3", code=2)
    assert "do not divide into pods of 3" in said


# -------------------------------------------------------------------------------------------------------- SLURM


@pytest.fixture
def checkout(fake):
    """A copy of the launchers whose .venv the stand-in for Python makes."""
    root = fake / "check out"
    shutil.copytree(LAUNCH, root / "launch")
    shutil.copy(LAUNCH.parent / "setup.py", root)
    return root


def test_a_slurm_job_carries_every_word(fake, checkout):
    script = str(checkout / "launch" / "slurm.sh")
    launch(fake, script, "--nodes", "4", "--gpus", "2", "--partition=big one", "--retries", "1", "--", *HOSTILE)
    (call,) = told(fake, "sbatch")
    options = {"--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=2", "--requeue", "--partition=big one"}
    options |= {"--cpus-per-gpu=4"}
    assert options <= set(call["words"])
    job = call["words"][call["words"].index(script) + 1 :]
    assert job[-len(HOSTILE) :] == HOSTILE
    # SLURM runs a copy of the script with these words. 143: it was told to stop, and has saved.
    spooled = shutil.copy(script, fake / "spooled")
    for count, requeued in (("0", 1), ("1", 0)):
        code = 0 if requeued else 143
        launch(fake, spooled, *job, code=code, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=count, srun_CODE="143")
        assert len(told(fake, "scontrol")) == 1
    assert told(fake, "scontrol")[0]["words"] == ["requeue", "7"]
    step = told(fake, "srun")[0]["words"]
    assert step[step.index(f"{checkout}/.venv/bin/lwd") + 1 :] == ["train", *HOSTILE] and "--ntasks-per-node=1" in step
    assert told(fake, "srun")[0]["flags"] == f"--flags gpu {os.environ.get('XLA_FLAGS', '')}"
    for code, requeued in ((1, 0), (2, 0), (75, 1)):
        (fake / "scontrol").unlink(missing_ok=True)
        # What a task makes of the code of its command is what srun tells, were it the highest of all tasks.
        command = ["bash", "-c", f"exit {code}"]
        task = subprocess.run(["bash", script, "task", *command], env=os.environ | {"SLURM_JOB_ID": "7"}).returncode
        assert task == 1 if code == 1 else task > 128 + signal.SIGTERM
        launch(fake, spooled, *job, code=0 if requeued else code, SLURM_JOB_ID="7", srun_CODE=str(task))
        assert len(told(fake, "scontrol")) == requeued


def test_a_dry_slurm_job_is_printed_only(fake):
    said = launch(fake, "slurm.sh", "--dry_run", "--", *HOSTILE)
    assert words_of(said.rstrip("\n"), fake)[-len(HOSTILE) :] == HOSTILE and not told(fake, "sbatch")


@pytest.mark.parametrize("option", ["--cpus-per-gpu=7", "--cpus-per-task=9", "--exclusive", "--exclusive=user"])
def test_a_slurm_job_has_the_cores_that_are_asked_for(fake, option):
    words = words_of(launch(fake, "slurm.sh", option, "--dry_run", "--", *HOSTILE).rstrip("\n"), fake)
    assert [word for word in words if word.startswith(("--cpus", "--exclusive"))] == [option]


@pytest.mark.parametrize(
    "words, variables, added",
    [
        ((), {}, True),
        (("--comment=try --exclusive later",), {}, True),
        ((), {"SBATCH_CPUS_PER_GPU": "16"}, False),
        (("--tres-per-task=cpu:8",), {}, False),
        (("--gpus", "0"), {}, False),
    ],
)
def test_a_slurm_job_asks_for_cores_where_nothing_says_how_many(fake, words, variables, added):
    said = launch(fake, "slurm.sh", *words, "--dry_run", "--", *HOSTILE, **variables)
    assert ("--cpus-per-gpu=4" in words_of(said.rstrip("\n"), fake)) == added


# ---------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("script", ["tpu_run.sh", "gke_jobset.sh", "slurm.sh"])
def test_help_shows_an_example(fake, script):
    assert f"example:\n  bash launch/{script} " in launch(fake, script, "--help")


def test_launchers_are_clean():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    ran = subprocess.run([shellcheck, "-x", *LAUNCH.glob("*.sh")], cwd=LAUNCH.parent, capture_output=True)
    assert ran.returncode == 0, ran.stdout.decode()
