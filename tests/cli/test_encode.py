"""`lwd encode` with a small KL autoencoder from a diffusers folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_models import KL, autoencoder, write_workdir

from lwd_jax.autoencoders import load_autoencoder, save_autoencoder
from lwd_jax.cli import encode as command
from lwd_jax.cli import main
from lwd_jax.config import load_config
from lwd_jax.data.dataset import open_dataset
from lwd_jax.data.latents import open_latents
from lwd_jax.data.pictures import decode
from lwd_jax.train.models import open_autoencoder
from lwd_jax.weights.folder import fingerprint


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("encode")
    (root / "images").mkdir()
    for i, shape in enumerate([(70, 100), (100, 70), (80, 110)]):
        values = np.random.default_rng(i).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(values).save(root / "images" / f"{i}.png")
        (root / "images" / f"{i}.txt").write_text(f"picture {i}\nnumber {i}")
    assert (
        main(["prepare", "--images", str(root / "images"), "--out", str(root / "dataset"), "--resolution", "64"]) == 0
    )
    for name, seed in (("one", 0), ("two", 1)):
        save_autoencoder(root / name, *autoencoder(seed))
    return root


def encode(root, models="one", *more):
    arguments = [
        "encode",
        "--dataset",
        str(root / "dataset"),
        "--models",
        str(root / models),
        "--out",
        str(root / "latents"),
    ]
    return main([*arguments, "--resolution", "64", "--batch-size", "2", "--storage", "float32", *more])


def test_latents_are_the_autoencoders(root, capsys):
    assert encode(root, "one", "--text", "hashed_words", "--text-width", "24", "--smallest-bucket", "1") == 0
    printed = capsys.readouterr().out
    assert "stand-in" in printed and "3 encoded, 0 kept" in printed and "lwd train" in printed.splitlines()[-1]
    latents, dataset = open_latents(root / "latents"), open_dataset(root / "dataset")
    module, params = load_autoencoder(root / "one")
    assert latents.metadata["autoencoder_fingerprint"] == fingerprint(params)
    assert latents.metadata["autoencoder"]["scaling"] == KL.scaling
    assert latents.metadata["autoencoder"]["latent_channels"] == KL.latent_channels
    assert latents.metadata["text"]["width"] == 24 and len({tuple(size) for size in latents.sizes}) == 2
    reference = jax.jit(lambda x: module.apply({"params": params}, x, method="encode"))
    for number in range(3):
        picture = decode(dataset[number].picture, tuple(latents.sizes[number]))
        x = jnp.asarray(picture[None], jnp.float32) / 127.5 - 1
        posterior = reference(x)
        mean, std = latents.latent(number)
        np.testing.assert_allclose(mean, posterior.mean[0], atol=2e-5)
        np.testing.assert_allclose(std, np.exp(0.5 * posterior.logvar[0]), rtol=2e-5)
    # Again with the same weights: nothing to do. With others: everything.
    assert encode(root, "one", "--text", "hashed_words", "--text-width", "24", "--smallest-bucket", "1") == 0
    assert "0 encoded, 3 kept" in capsys.readouterr().out
    assert encode(root, "two", "--text", "hashed_words", "--text-width", "24", "--no-buckets") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert encode(root, "two", "--text", "hashed_words", "--text-width", "24", "--no-buckets", "--overwrite") == 0
    assert "3 encoded, 0 kept" in capsys.readouterr().out
    assert (open_latents(root / "latents").sizes == 64).all()


@pytest.mark.parametrize("mesh", ["1,1,8,1", "2,1,4,1", "1,2,3,1"])
def test_a_mesh_makes_the_same_latents(root, tmp_path, mesh):
    """Over `context` lie heights, or the widths of a bucket whose heights do not divide."""
    options = ("--text", "hashed_words", "--text-width", "24", "--smallest-bucket", "1")
    for out, more in (("one", ("--mesh", "1,1,1,1")), ("many", ("--mesh", mesh))):
        assert encode(root, "one", *options, "--out", str(tmp_path / out), *more) == 0
    one, many = (open_latents(tmp_path / out) for out in ("one", "many"))
    for number in range(3):
        for wanted, found in zip(one.latent(number), many.latent(number), strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert one.metadata == many.metadata


def test_plain_weights_are_those_of_a_run_without_averages(root, capsys):
    """Stage 2 with models.ema=False decodes with the last weights: its latents must be theirs."""
    first = write_workdir(root / "stage1", 1, seed=3)
    second = write_workdir(root / "stage2", 2, seed=4, models={"autoencoder": str(first)})
    text = ("--text", "hashed_words", "--text-width", "24", "--no-buckets", "--out")
    assert encode(root, "stage1", *text, str(root / "plain latents"), "--plain") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "--config.models.ema=False" in last and f"'--config.data.latents={root}/plain latents'" in last
    made_by = open_latents(root / "plain latents").metadata["autoencoder_fingerprint"]
    models = {"autoencoder": str(first), "autoencoder_variant": ""}
    averaged, plain = (
        fingerprint(open_autoencoder(load_config({"stage": 2, "models": models | {"ema": ema}})).params())
        for ema in (True, False)
    )
    assert made_by == plain != averaged
    for models, words in (("one", "one set of weights"), (second.name, "is of stage 2")):
        assert encode(root, models, *text, str(root / "refused"), "--plain") == 2
        assert words in capsys.readouterr().err and not (root / "refused").exists()


def test_so_many_captions_and_arithmetic_as_asked(root, tmp_path, monkeypatch):
    built = []

    def posterior_of(module):
        built.append(jnp.dtype(module.dtype).name)
        return lambda params, pictures: (jnp.zeros((2, 8, 8, 4)), jnp.ones((2, 8, 8, 4)))

    monkeypatch.setattr(command, "make_posterior", posterior_of)
    for name, more in {"usual": (), "asked": ("--captions", "1", "--dtype", "bfloat16")}.items():
        given = ("--text", "hashed_words", "--no-buckets", "--out", str(tmp_path / name))
        assert encode(root, "one", *given, *more) == 0
    usual, asked = (open_latents(tmp_path / name) for name in ("usual", "asked"))
    assert [usual.text(2, i)[1] for i in range(usual.caption_count(2))] == ["picture 2", "number 2"]
    assert [asked.text(2, i)[1] for i in range(asked.caption_count(2))] == ["picture 2"]
    assert [usual.metadata["dtype"], asked.metadata["dtype"]] == built == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    "change, words",
    [
        (["--dataset", "nowhere"], "no dataset folder 'nowhere'"),
        (["--models", "nowhere"], "no folder 'nowhere'"),
        (["--resolution", "100"], "does not divide"),
        (["--text", "sd3"], "text"),
        ([], "--text hashed_words"),
        (["--batch-size", "0", "--text", "hashed_words"], "one picture at a time"),
        (["--mesh", "3,1,1,1"], "A batch of 2 pictures does not divide over data x fsdp = 3"),
        (["--mesh", "1,1,9,1"], "takes 9 devices, but 8 are here"),
        (["--text", "hashed_words", "--text-length", "0"], "at least one token"),
        (["--text", "hashed_words", "--text-width", "-3"], "at least one token"),
        (["--text", "hashed_words", "--out", "IMAGES"], "choose another --out"),
        (["--text", "hashed_words", "--text-dtype", "float16"], "--text-dtype says nothing to the text encoder hashed"),
        (["--text", "sd3", "--text-models", "one", "--text-width", "8"], "--text-width says nothing to the text encod"),
    ],
)
def test_mistakes_are_one_sentence(root, capsys, change, words):
    change = [str(root / "images") if word == "IMAGES" else word for word in change]
    assert encode(root, "one", *change) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("lwd: ") and words in error, error
