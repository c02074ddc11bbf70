"""`lwd sample`: PNG files that carry their parameters, samples.json, and one sentence with exit code 2 for mistakes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from tiny_models import write_pipeline, write_workdir

from lwd_jax.cli import main
from lwd_jax.cli import sample as command
from lwd_jax.sample.generate import initial_noise


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of stage 2, beside the folder it started from."""
    place = tmp_path_factory.mktemp("runs")
    folder = str(write_pipeline(place / "sd3"))
    models = {"autoencoder": folder, "backbone": folder}
    return write_workdir(place / "run", 2, seed=20, text=True, models=models, sampling={"steps": 3, "guidance": 3.0})


def sample(*arguments):
    return main(["sample", *map(str, arguments)])


def test_pictures_carry_what_made_them(run, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("eine Straße\n\n", encoding="utf-8-sig")  # with a byte order mark
    out = tmp_path / "out"
    options = ("--prompt", "a cat", "--prompt-file", prompts, "--negative", "fog", "--resolution", "80x48", "--seed", 3)
    assert sample("--models", run, *options, "--count", 2, "--batch", 2, "--shift", 1.5, "--out", out) == 0
    index = json.loads((out / "samples.json").read_text())
    assert [entry["prompt"] for entry in index["samples"]] == ["a cat", "a cat", "eine Straße", "eine Straße"]
    expected = {"steps": 3, "guidance": 3.0, "shift": 1.5, "solver": "euler", "dtype": "float32"}
    expected |= {"shift_rule": "static", "embedded_guidance": 3.5}
    assert index["settings"] == expected and index["models"]["weights"] == "ema"
    assert sorted(path.name for path in out.iterdir()) == [*(f"{i:05d}.png" for i in range(4)), "samples.json"]
    for number, entry in enumerate(index["samples"]):
        with Image.open(out / entry["file"]) as picture:
            assert picture.size == (80, 48) and picture.mode == "RGB" and picture.text["prompt"] == entry["prompt"]
            carried = json.loads(picture.text["lwd"])
        assert carried == entry | expected | {"models": index["models"]} and carried["index"] == number
        assert (carried["seed"], carried["negative"], carried["width"]) == (3, "fog", 80)
    said = capsys.readouterr().out
    assert "hashed_words" in said and "Next: lwd" in said.splitlines()[-1]


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_latents_from_pytorch_take_the_place_of_the_seed(run, tmp_path, suffix):
    noise = np.asarray(initial_noise(11, [0], (6, 10, 4))).transpose(0, 3, 1, 2).copy()
    file = tmp_path / f"noise.{suffix}"
    np.save(file, noise) if suffix == "npy" else save_file({"latents": noise}, file)
    both = {"given": ("--latents", file), "seeded": ("--seed", 11, "--resolution", "80x48")}
    for name, options in both.items():
        assert sample("--models", run, "--prompt", "a cat", *options, "--out", tmp_path / name) == 0
    given, seeded = (np.asarray(Image.open(tmp_path / name / "00000.png")) for name in both)
    np.testing.assert_array_equal(given, seeded)
    assert json.loads((tmp_path / "given" / "samples.json").read_text())["samples"][0]["seed"] is None


def test_a_given_shift_is_the_same_at_every_size(run, tmp_path, monkeypatch):
    """Also where the run's own grows with the picture."""
    config = json.loads((run / "config.json").read_text())
    config["sampling"]["shift_rule"] = "dynamic"
    grown = shutil.copytree(run, tmp_path / "run")
    (grown / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(command, "sample_pictures", lambda *_: iter([np.zeros((48, 48, 3), np.uint8)]))
    told = []
    for name, more in {"own": (), "given": ("--shift", 6)}.items():
        given = ("--prompt", "a cat", "--resolution", 48, *more)
        assert sample("--models", grown, *given, "--out", tmp_path / name) == 0
        settings = json.loads((tmp_path / name / "samples.json").read_text())["settings"]
        told.append((settings["shift_rule"], settings["shift"]))
    assert told == [("dynamic", config["sampling"]["shift"]), ("static", 6)]


def test_plain_weights_and_another_solver_draw_something_else(run, tmp_path):
    options = {"ema": (), "plain": ("--plain",), "heun": ("--solver", "heun")}
    for name, more in options.items():
        given = ("--prompt", "a cat", "--resolution", "80x48", *more)
        assert sample("--models", run, *given, "--out", tmp_path / name) == 0
    assert len({(tmp_path / name / "00000.png").read_bytes() for name in options}) == 3
    assert len({np.asarray(Image.open(tmp_path / name / "00000.png")).tobytes() for name in options}) == 3


@pytest.mark.parametrize(
    "mesh, size", [("1,2,4,1", "80x64"), ("2,1,3,1", "80x48"), ("1,1,5,1", "80x64"), ("1,1,2,2", "80x80")]
)
def test_a_mesh_draws_the_same_pictures(run, tmp_path, mesh, size):
    """Three pictures in batches of two; heights that divide over `context`, widths that do, and both."""
    given = ("--models", run, "--resolution", size, "--batch", 2, *("--prompt", "a cat", "--count", 3))
    assert sample(*given, "--out", tmp_path / "one") == 0
    assert sample(*given, "--out", tmp_path / "many", "--mesh", mesh) == 0
    for name in ("00000.png", "00001.png", "00002.png"):
        one, many = (np.asarray(Image.open(tmp_path / place / name), np.int32) for place in ("one", "many"))
        assert abs(one - many).max() <= 1 and one.std() > 1


@pytest.mark.parametrize(
    "change,sentence",
    [
        ({"--models": "nowhere"}, "There is no folder 'nowhere'."),
        ({"--mesh": "1,8"}, "Write --mesh as devices along data,fsdp,context,tensor, such as 1,1,8,1, not as '1,8'."),
        ({"--mesh": "1,1,0,1"}, "such as 1,1,8,1, not as '1,1,0,1'."),
        ({"--mesh": "3,3,1,1"}, "--mesh 3,3,1,1 takes 9 devices, but 8 are here."),
        ({"--mesh": "1,2,4,1"}, "A batch of 1 pictures does not divide over data x fsdp = 2 devices."),
        ({"--resolution": "1000"}, "Pictures must measure multiples of 16 px, but 1000 x 1000 was asked for."),
        ({"--resolution": "64y32"}, "Write --resolution as a side in px or as WIDTHxHEIGHT, not as '64y32'."),
        ({"--resolution": "128x"}, "not as '128x'."),
        ({"--resolution": "128x64x32"}, "not as '128x64x32'."),
        ({"--seed": str(2**32)}, "The seed must lie in [0, 4294967295], but it is 4294967296."),
        ({"--seed": "-1"}, "The seed must lie in [0, 4294967295], but it is -1."),
        ({"--guidance": "nan"}, "The guidance is nan: no finite number."),
        ({"--guidance": "inf"}, "The guidance is inf: no finite number."),
        ({"--embedded-guidance": "nan"}, "The embedded guidance is nan: no finite number."),
        ({"--shift": "inf"}, "The shift is inf: no finite number."),
        ({"--prompt": "half \udcff"}, r"The prompt is not Unicode text: 'half \udcff'."),
        ({"--negative": "\ud800"}, r"The prompt is not Unicode text: '\ud800'."),
        ({"--prompt": None}, "There is nothing to draw: give --prompt or --prompt-file."),
        ({"--prompt-file": "gone.txt"}, "There is no file 'gone.txt'."),
        ({"--solver": "huen"}, "There is no solver 'huen'. Did you mean 'heun'?"),
        ({"--count": "0"}, "--count must be at least 1, but it is 0."),
        ({"--steps": "0"}, "Sampling needs at least 1 step, but 0 was given."),
        ({"--batch": "0"}, "At least one picture at a time must be sampled, but the batch is 0."),
        ({"--latents": "noise.pt"}, "There is no file 'noise.pt'."),
        ({"--models": "FOLDER"}, "comes with no text encoder; name a folder that has them with --text-models."),
        ({"--models": "FOLDER", "--text-models": "gone"}, "'gone' has no folder 'text_encoder'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes(run, tmp_path, capsys, change, sentence):
    given = {"--models": str(run), "--prompt": "a cat", "--resolution": "48"} | change
    if given["--models"] == "FOLDER":
        given["--models"] = str(run.parent / "sd3")
    options = [word for pair in given.items() if pair[1] is not None for word in pair]
    assert sample(*options, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_prompt_file_of_another_encoding_is_named(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_bytes("eine Straße".encode("latin-1"))
    assert sample("--models", run, "--prompt-file", tmp_path / "prompts.txt", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"lwd: The file '{tmp_path}/prompts.txt' is not UTF-8 text.\n"


def test_latents_that_do_not_fit_are_named(run, tmp_path, capsys):
    def status(name):
        given = ("--models", run, "--prompt", "a cat", "--latents", tmp_path / name)
        return sample(*given, "--out", tmp_path / "out")

    np.save(tmp_path / "noise.npy", np.zeros((2, 4, 6, 6), np.float32))
    assert status("noise.npy") == 2
    assert "2 of 4 x 6 x 6, but 1 of 4 x 6 x 6 are needed" in capsys.readouterr().err
    np.save(tmp_path / "flat.npy", np.zeros((4, 6, 6), np.float32))
    assert status("flat.npy") == 2
    assert "one tensor of latents" in capsys.readouterr().err
    (tmp_path / "pickled.npy").write_bytes(np.array([None], dtype=object).dumps())
    np.savez(tmp_path / "several", a=np.zeros(1), b=np.zeros(1))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    for name in ("empty.npy", "empty.safetensors"):
        (tmp_path / name).touch()
    for name in ("pickled.npy", "several.npy", "empty.npy", "empty.safetensors"):
        assert status(name) == 2
        error = capsys.readouterr().err
        assert f"{name}' cannot be read: " in error and error.count("\n") == 1, error
    np.save(tmp_path / "nan.npy", np.full((1, 4, 6, 6), np.nan, np.float32))
    assert status("nan.npy") == 2
    assert "nan.npy' holds values that are not finite" in capsys.readouterr().err
    (tmp_path / "noise.pt").touch()
    assert status("noise.pt") == 2
    assert "noise.pt' is neither" in capsys.readouterr().err


def test_a_diffusers_folder_takes_another_autoencoder_but_has_no_plain_weights(run, tmp_path, capsys):
    """Stock SD3 with the autoencoder of stage 1; the text states are those of an exported run."""
    folder = tmp_path / "exported"
    assert main(["export", "--workdir", str(run), "--out", str(folder)]) == 0
    first = write_workdir(tmp_path / "stage1", 1, seed=40, models={"autoencoder": str(folder)})
    given = ("--models", folder, "--prompt", "a cat", "--resolution", "80x48")
    for name, more in {"own": (), "other": ("--autoencoder", first)}.items():
        assert sample(*given, *more, "--out", tmp_path / name) == 0, capsys.readouterr().err
    own, other = (Image.open(tmp_path / name / "00000.png") for name in ("own", "other"))
    assert np.abs(np.asarray(own, int) - np.asarray(other)).mean() > 1
    index = json.loads((tmp_path / "other" / "samples.json").read_text())
    assert index["models"] == {"path": str(folder), "autoencoder": str(first)}
    capsys.readouterr()
    assert sample(*given, "--plain", "--out", tmp_path / "plain") == 2
    assert "which has one set of weights" in capsys.readouterr().err
    assert sample(*given, "--autoencoder", tmp_path / "gone", "--out", tmp_path / "plain") == 2
    assert "There is no folder" in capsys.readouterr().err and not (tmp_path / "plain").exists()


def test_a_taken_folder_is_refused(run, tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    for more in ((), ("--overwrite",)):
        assert sample("--models", run, "--prompt", "a cat", "--out", tmp_path, *more) == 2
        assert str(tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
