"""`lwd inspect`: its numbers against the objective's functions, its pictures, and one sentence for mistakes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from skimage import data
from tiny_models import KL, write_pipeline

from lwd_jax.autoencoders import load_autoencoder
from lwd_jax.cli import main
from lwd_jax.cli.inspect import open_space
from lwd_jax.cli.models_flag import open_given
from lwd_jax.evaluate.spectrum import block_mean
from lwd_jax.objective.masks import supervision_mask
from lwd_jax.objective.saliency import wavelet_saliency
from lwd_jax.weights.folder import fingerprint


def inspect(*arguments):
    return main(["inspect", *map(str, arguments)])


@pytest.fixture
def photograph(tmp_path):
    """149 x 205 px: the centre of it that divides by 16 is 144 x 192."""
    picture = data.astronaut()[:149, 100:305]
    Image.fromarray(picture).save(tmp_path / "face.png")
    return tmp_path / "face.png", picture[2:146, 6:198]


def result_of(folder):
    return json.loads((folder / "inspect.json").read_text())


def test_without_models_block_means_of_colours_stand_in(photograph, tmp_path, capsys):
    path, picture = photograph
    out, times = tmp_path / "out", (0.2, 0.5, 1.0)
    assert inspect(path, path, "--out", out, "--times", *times, "--floor", 0.4) == 0
    drawn = [f"{name}_{what}.png" for name in ("face", "face~2") for what in ("saliency", "masks", "spectrum")]
    assert sorted(file.name for file in out.iterdir()) == sorted([*drawn, "supervised.png", "inspect.json"])
    for file in out.glob("*.png"):
        with Image.open(file) as image:
            assert image.size == (24, 18) if "saliency" in file.name else min(image.size) > 300
    z = block_mean(picture[None] / np.float32(127.5) - 1, 8)
    saliency = wavelet_saliency(jnp.asarray(z))
    first, second = result_of(out)["pictures"]
    assert first["latent"] == [18, 24, 3] and first["supervised"]["0.2"] == 1.0
    for t in times:
        mask = supervision_mask(saliency, jnp.array([t]), 0.4)
        assert first["supervised"][f"{t:g}"] == pytest.approx(float(mask.mean()), abs=1e-6)
    curve, at = first["curve"], result_of(out)["curve_times"]
    assert np.all(np.diff(curve) <= 0) and curve[at.index(0.4)] == 1 and curve[-1] == first["supervised"]["1"]
    assert 0 < first["high_frequency_share"] < 1 and first["name"] == "face" and second["name"] == "face~2"
    said = capsys.readouterr().out
    assert "own colours" in said and said.splitlines()[-1].startswith("Wrote 7 pictures and inspect.json to ")


def test_models_are_looked_at_in_their_own_latent_space(photograph, tmp_path):
    """As a backbone sees it: noise would hide more of a latent of another scale."""
    path, picture = photograph
    folder = write_pipeline(tmp_path / "sd3")
    options = ("--times", 0.5, "--levels", 2, "--source", "noisy")
    assert inspect(path, "--models", folder, "--out", tmp_path / "out", *options) == 0
    module, params = load_autoencoder(folder)
    x = jnp.asarray(picture[None] / np.float32(127.5) - 1)
    encode = jax.jit(lambda params, x: module.apply({"params": params}, x, method="encode").mean)
    z = (encode(params, x) - KL.shift) * KL.scaling
    z_t = (z + jax.random.normal(jax.random.key(0), z.shape)) / 2
    mask = supervision_mask(wavelet_saliency(z_t, levels=2), jnp.array([0.5]))
    entry = result_of(tmp_path / "out")["pictures"][0]
    assert entry["latent"] == [18, 24, 4]
    assert entry["supervised"]["0.5"] == pytest.approx(float(mask.mean()), abs=5e-3)


def test_another_autoencoder_than_that_of_the_models_is_taken(tmp_path):
    first, second = (str(write_pipeline(tmp_path / str(seed), seed)) for seed in (0, 5))
    made_by = {
        name: fingerprint(open_given(*models).autoencoder()[1])
        for name, models in {"first": (first,), "second": (second,)}.items()
    }
    replaced = fingerprint(open_given(first, autoencoder=second).autoencoder()[1])
    assert replaced == made_by["second"] != made_by["first"]
    assert open_space(first, second, "float32").description["models"] == {"path": first, "autoencoder": second}


def test_files_of_one_name_do_not_meet(photograph, tmp_path):
    path = photograph[0]
    numbered = path.with_name("face~2.png")
    numbered.write_bytes(path.read_bytes())
    assert inspect(numbered, path, path, "--out", tmp_path / "out", "--times", 0.5) == 0
    names = [entry["name"] for entry in result_of(tmp_path / "out")["pictures"]]
    assert names == ["face~2", "face", "face~3"] and len(list((tmp_path / "out").glob("*.png"))) == 10


def test_a_name_with_dollars_is_no_mathematics(photograph, tmp_path):
    path = photograph[0]
    for number, name in enumerate(("cost $5_and_$10.png", r"a$\frac$b.png")):
        path.with_name(name).write_bytes(path.read_bytes())
        assert inspect(path.with_name(name), "--out", tmp_path / str(number), "--times", 0.5) == 0


def test_noisy_source_follows_the_noise(photograph, tmp_path):
    models = ("--models", write_pipeline(tmp_path / "sd3"), "--times", 0, 0.9)
    shares = {}
    for source in ("clean", "noisy"):
        assert inspect(photograph[0], *models, "--source", source, "--out", tmp_path / source) == 0
        shares[source] = result_of(tmp_path / source)["pictures"][0]["supervised"]
    assert shares["clean"]["0"] == shares["noisy"]["0"] == 1 and shares["clean"]["0.9"] != shares["noisy"]["0.9"]


def test_baseline_supervises_everything_and_long_side_scales_down(photograph, tmp_path):
    assert inspect(photograph[0], "--out", tmp_path / "out", "--mask", "everywhere", "--long-side", 100) == 0
    entry = result_of(tmp_path / "out")["pictures"][0]
    assert (entry["width"], entry["height"]) == (96, 64)
    assert set(entry["curve"]) == {1.0} and entry["supervised_over_uniform_t"] == pytest.approx(1)


def test_mistakes_are_one_sentence_and_leave_nothing(photograph, tmp_path, capsys):
    picture, out = photograph[0], tmp_path / "out"
    text = tmp_path / "text.png"
    text.write_text("no picture")
    bomb, strip = tmp_path / "bomb.png", tmp_path / "strip.png"
    Image.new("RGB", (1000, 100)).save(strip)
    Image.new("1", (20_000, 20_000)).save(bomb)
    for arguments, said in {
        (tmp_path / "missing.png",): "is not there",
        (tmp_path,): "is a folder",
        (text,): "cannot be read",
        (bomb,): "picture bomb",
        (picture, "--wavelet", "hara"): "Did you mean 'haar'?",
        (picture, "--levels", 9): "has no 9 wavelet levels",
        (picture, "--floor", 1.2): "--floor must lie in (0, 1), but it is 1.2",
        (picture, "--floor", 0): "--floor must lie in (0, 1), but it is 0",
        (picture, "--seed", 2**70): "The seed must lie in [0, 4294967295]",
        (picture, "--times", 0.5, 3): "one is 3",
        (picture, "--source", "noisy"): "needs --models",
        (picture, "--mask", "soft", "--softness", "inf"): "--softness must be positive and finite",
        (strip, "--long-side", 100): "100 x 10 px, scaled to --long-side 100, is less than",
        (picture, "--autoencoder", tmp_path): "name the folder with --models instead",
        (picture, "--models", tmp_path / "nowhere"): "There is no folder",
    }.items():
        assert inspect(*arguments, "--out", out) == 2
        error = capsys.readouterr().err
        assert error.startswith("lwd: ") and said in error and error.count("\n") == 1
        assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_an_earlier_result_is_replaced_only_when_asked(photograph, tmp_path, capsys):
    out = tmp_path / "out"
    assert inspect(photograph[0], "--out", out, "--times", 0.5) == 0
    assert inspect(photograph[0], "--out", out) == 2 and "--overwrite" in capsys.readouterr().err
    assert inspect(photograph[0], "--out", out, "--times", 0.9, "--overwrite") == 0
    assert result_of(out)["settings"]["times"] == [0.9]
