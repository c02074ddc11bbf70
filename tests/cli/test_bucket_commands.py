"""Commands on workdirs in a bucket: what a run wrote there is sampled, exported, encoded with and trained from."""

import json

import pytest
from bucket import names, put_folder, serve
from safetensors.numpy import load_file
from test_train import config_of
from tiny_models import write_inputs, write_workdir

from lwd_jax.cli import main
from lwd_jax.cli.doctor import OK, check_host, check_workdir
from lwd_jax.data.latents import open_latents
from lwd_jax.files import locate
from lwd_jax.report import previews
from lwd_jax.train import metrics
from lwd_jax.train.checkpoint import saved_steps


@pytest.fixture(scope="module")
def objects():
    return serve()


@pytest.fixture(scope="module")
def runs(objects, tmp_path_factory):
    """Runs of both stages, in folders and, of the same names, in a bucket."""
    root = tmp_path_factory.mktemp("runs")
    write_workdir(root / "stage1", 1, text=True)
    write_workdir(root / "stage2", 2, text=True)
    put_folder(root, "gs://runs/all")
    return root, "gs://runs/all"


def said(capsys, words):
    assert main(words) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_an_export_of_a_run_in_a_bucket_is_that_of_the_folder(runs, tmp_path, capsys):
    root, address = runs
    for place, name in ((root, "here"), (address, "there")):
        said(capsys, ["export", f"--workdir={place}/stage1", f"--out={tmp_path / name}"])
    file = "vae/diffusion_pytorch_model.safetensors"
    here, there = load_file(tmp_path / "here" / file), load_file(tmp_path / "there" / file)
    assert here.keys() == there.keys() and all((here[name] == there[name]).all() for name in here)
    assert "| loss |" in (tmp_path / "there" / "README.md").read_text()


def test_samples_of_a_run_in_a_bucket_into_the_bucket(runs, objects, tmp_path, capsys):
    root, address = runs
    prompt = ["--prompt=a boat", "--steps=2", "--resolution=32"]
    here = [f"--models={root}/stage2", f"--autoencoder={root}/stage1", f"--out={tmp_path / 'here'}"]
    there = [f"--models={address}/stage2", f"--autoencoder={address}/stage1", "--out=gs://samples/out"]
    said(capsys, ["sample", *prompt, *here])
    assert "lwd inspect gs://samples/out/00000.png" in said(capsys, ["sample", *prompt, *there])
    assert names("samples") == ["out/00000.png", "out/samples.json"]
    made = [json.loads(text)["samples"] for text in ((tmp_path / "here" / "samples.json").read_bytes(),
                                                     objects["samples", "out/samples.json"][0])]  # fmt: skip
    assert made[0] == made[1]
    assert main(["sample", *prompt, *there]) == 2 and "--overwrite" in capsys.readouterr().err
    looked = ["inspect", "gs://samples/out/00000.png", "--long-side=64", f"--out={tmp_path / 'looked'}"]
    assert main(looked) == 2 and "px" in capsys.readouterr().err  # 32 px are too few for a spectrum: it was read


def test_the_doctor_looks_at_a_workdir_in_a_bucket(runs):
    (found,) = check_workdir(f"{runs[1]}/stage1", None)
    assert found.verdict == OK and "sound checkpoint of step 7" in found.found
    (found,) = check_workdir("gs://runs/none", None)
    assert found.verdict == OK and "a new run" in found.found
    (disk,) = (each.found for each in check_host(locate("gs://runs/all")) if each.what == "disk")
    assert disk.endswith("in a bucket")


def test_a_run_in_a_bucket_goes_on_from_one_in_a_bucket(runs, objects, tmp_path, capsys):
    """Of stage 2, whose autoencoder a run of stage 1 in the bucket holds; stopped after two steps, and resumed."""
    write_inputs(tmp_path)
    config = config_of(tmp_path, 2)
    config["models"] |= {"autoencoder": f"{runs[1]}/stage1", "ema": False}  # the plain weights are those of `vae`
    config["data"] |= {"batch_size": 8, "held_out": 1}
    config["training"]["steps"] = 2
    (tmp_path / "stage2.json").write_text(json.dumps(config))
    train = ["train", f"--config={tmp_path}/stage2.json", "--workdir=gs://trained/run"]
    assert "--models gs://trained/run" in said(capsys, train)
    assert saved_steps("gs://trained/run") == [2]
    said(capsys, [*train, "--config.training.steps=4"])
    assert [line["step"] for line in metrics.read("gs://trained/run")] == [1, 2, 3, 4]


def test_latents_are_made_by_a_run_in_a_bucket(runs, tmp_path, capsys):
    write_inputs(tmp_path)
    words = ["encode", f"--dataset={tmp_path}/dataset", f"--models={runs[1]}/stage1", "--plain", "--resolution=32"]
    said(capsys, [*words, f"--out={tmp_path}/again", "--no-buckets", "--text=hashed_words", "--batch-size=4"])
    made = (open_latents(tmp_path / name).metadata["autoencoder_fingerprint"] for name in ("again", "latents"))
    assert len(set(made)) == 1


def test_previews_are_objects(objects):
    previews._write(locate("gs://previews/run"), "a.png", b"png")
    assert objects["previews", "run/previews/a.png"][0] == b"png"
