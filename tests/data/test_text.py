"""Laws of text states: hashed words, and SD3's and FLUX's encoders against the diffusers pipelines."""

import json

import numpy as np
import pytest

from lwd_jax.data.text import flux, hashed_words, kind_of, open_text_encoder, sd3
from lwd_jax.errors import UserError

CAPTIONS = ["a lighthouse at dusk", "", "red fox, Red Fox!", " ".join(["lighthouse"] * 90)]


def test_hashed_words_tell_words_apart():
    encoder = hashed_words(None, length=16, width=64, pooled=32)
    states = encoder.encode(CAPTIONS)
    assert states.tokens.shape == (4, 16, 64) and states.mask.shape == (4, 16) and states.pooled.shape == (4, 32)
    assert all(values.dtype == np.float32 for values in states)
    assert states.mask.sum(1).tolist() == [5, 1, 5, 16]  # with the first token, cut at the length
    assert (states.tokens[states.mask == 0] == 0).all() and (np.abs(states.tokens[states.mask == 1]) == 1).all()
    fox = states.tokens[2]
    assert (fox[1:3] == fox[3:5]).all() and not (fox[1] == fox[2]).all()  # case and punctuation do not count
    assert (states.pooled[1] == 0).all() and (states.tokens[:, 0] == states.tokens[0, 0]).all()
    # Different words are nearly orthogonal; the pooled vector has unit mean square on average.
    many = hashed_words(None, length=400, width=256, pooled=256).encode([" ".join(map(str, range(399)))])
    gram = many.tokens[0] @ many.tokens[0].T / 256
    assert np.abs(gram - np.eye(400)).max() < 0.45 and 0.6 < np.mean(many.pooled**2) < 1.5


def test_hashed_words_are_pinned_and_say_what_they_are():
    encoder = hashed_words(None)
    assert "stand-in" in encoder.notice
    alone, together = encoder.encode(["fox"]), encoder.encode(["a", "fox"])
    assert (alone.tokens[0] == together.tokens[1]).all()
    # The first bits of SHAKE-256 of "token fox", most significant bit first.
    assert "".join("01"[int(s > 0)] for s in alone.tokens[0, 1, :16]) == "0101010010011111"
    assert encoder.fingerprint != hashed_words(None, length=31).fingerprint


@pytest.mark.parametrize("count", [7, 8, 9])
def test_hashed_words_tell_of_words_they_do_not_read(count, caplog):
    encoder = hashed_words(None, length=9)
    captions = [" ".join(["fox"] * (count - 1) + [last]) for last in ("fox", "hen")]
    unread = count > 8
    first, second = encoder.encode(captions).tokens
    assert (first == second).all() == unread
    assert encoder.longer([*captions, "fox"]) == {"8 words": 2 * unread}
    encoder.tell_of_longer([*captions, "fox"])
    told = ["2 of 3 captions are longer than 8 words: their ends are not read."]
    assert caplog.messages == (told if unread else [])


@pytest.mark.parametrize("size", [{"length": 0}, {"width": -1}, {"pooled": 0}])
def test_hashed_words_of_no_size(size):
    with pytest.raises(UserError, match="at least one token"):
        hashed_words(None, **size)


def test_a_description_opens_the_same_encoder():
    encoder = hashed_words(None, length=9, width=24, pooled=40)
    again = open_text_encoder(json.loads(json.dumps(encoder.describe())))
    assert again.fingerprint == encoder.fingerprint and again.encode(["x"]).tokens.shape == (1, 9, 24)
    with pytest.raises(UserError, match="hashed_words"):
        open_text_encoder({"kind": "hashed_word"})


# ------------------------------------------------------------------------------------------------ SD3's encoders


def save_clip_tokenizer(folder):
    from transformers import CLIPTokenizer

    folder.mkdir()
    letters = list("abcdefghijklmnopqrstuvwxyz,!")
    vocabulary = (
        letters + [letter + "</w>" for letter in letters] + ["li", "gh", "ligh", "<|startoftext|>", "<|endoftext|>"]
    )
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\nl i\ng h\nli gh\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def save_t5_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import T5TokenizerFast

    letters = [("\u2581", -1.0)] + [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,!"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters, ("\u2581light", -2.0), ("house", -2.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    options = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 0}
    try:
        fast = T5TokenizerFast(tokenizer_object=tokenizer, **options)
    except TypeError:
        fast = T5TokenizerFast(vocab=vocabulary, **options)
    fast.save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small random encoders and tokenizers, in the layout of a diffusers pipeline."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("sd3")
    torch.manual_seed(0)
    for suffix, hidden, projection, act in (("", 16, 12, "quick_gelu"), ("_2", 24, 20, "gelu")):
        size = save_clip_tokenizer(root / f"tokenizer{suffix}")
        config = transformers.CLIPTextConfig(
            vocab_size=size,
            hidden_size=hidden,
            intermediate_size=32,
            projection_dim=projection,
            num_hidden_layers=3,
            num_attention_heads=2,
            hidden_act=act,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
            pad_token_id=size - 1,
        )
        transformers.CLIPTextModelWithProjection(config).save_pretrained(root / f"text_encoder{suffix}")
    size = save_t5_tokenizer(root / "tokenizer_3")
    config = transformers.T5Config(vocab_size=size, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=3)
    transformers.T5EncoderModel(config).save_pretrained(root / "text_encoder_3")
    return root


@pytest.mark.parametrize("with_t5", [True, False])
def test_equal_to_the_diffusers_pipeline(folder, tmp_path, with_t5):
    torch = pytest.importorskip("torch")
    import diffusers
    import transformers

    if not with_t5:
        for part in folder.iterdir():
            if not part.name.endswith("_3"):
                (tmp_path / part.name).symlink_to(part)
        (tmp_path / "transformer").mkdir()
        (tmp_path / "transformer" / "config.json").write_text('{"joint_attention_dim": 48}')
        folder = tmp_path
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=32,
    )
    clip = transformers.CLIPTextModelWithProjection.from_pretrained
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=diffusers.AutoencoderKL(),
        text_encoder=clip(folder / "text_encoder"), text_encoder_2=clip(folder / "text_encoder_2"),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder_3=transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_3") if with_t5 else None,
        tokenizer_3=transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer_3") if with_t5 else None,
    )  # fmt: skip
    encoder = sd3(folder, max_length=64)
    states = encoder.encode(CAPTIONS)
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(
            CAPTIONS, CAPTIONS, CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=64
        )
    assert states.tokens.shape == tokens.shape == (4, 77 + 64, 48) and states.pooled.shape == (4, 32)
    np.testing.assert_allclose(states.tokens, tokens.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(states.pooled, pooled.numpy(), rtol=1e-5, atol=1e-6)
    assert (states.mask == 1).all() and (encoder.length, encoder.width, encoder.pooled) == (141, 48, 32)
    assert set(encoder.longer([]).values()) == {0}
    encoder.tell_of_longer([])
    rooms = {"CLIP's 77 tokens": 1} | ({"T5's 64 tokens": 1} if with_t5 else {})
    assert encoder.longer(CAPTIONS) == rooms and set(encoder.longer(CAPTIONS[:3]).values()) == {0}
    # What just fits is not told of: 75 letters between CLIP's two marks, 63 words before T5's one.
    assert encoder.longer([" ".join(["a"] * count) for count in (75, 76)])["CLIP's 77 tokens"] == 1
    if with_t5:
        assert encoder.longer([" ".join(["light"] * count) for count in (63, 64)])["T5's 64 tokens"] == 1
    # The captions differ in every part that is there, so that equality above means something.
    assert np.ptp(states.tokens[:3, :77, :40], axis=0).max() > 0.1 and np.ptp(states.pooled[:3], axis=0).max() > 0.1
    assert (np.ptp(states.tokens[:3, 77:], axis=0).max() > 0.1) == with_t5


def test_fingerprints_follow_weights_and_settings(folder, tmp_path):
    pytest.importorskip("torch")
    import shutil

    from safetensors.numpy import load_file, save_file

    base = sd3(folder).fingerprint
    assert sd3(folder).fingerprint == base != sd3(folder, max_length=77).fingerprint
    changed = shutil.copytree(folder, tmp_path / "changed")
    (changed / "text_encoder_2" / "notes.md").write_text("not read")
    assert sd3(changed).fingerprint == base
    path = changed / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[...] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    found = [base, sd3(changed).fingerprint]
    for name in ("text_encoder/config.json", "tokenizer/merges.txt", "tokenizer_3/spiece.model"):
        with (changed / name).open("a") as file:
            file.write("\n")
        found.append(sd3(changed).fingerprint)
    assert len(set(found)) == 5


def test_mistakes(folder, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    import shutil
    import sys

    with pytest.raises(UserError, match="--text-models"):
        sd3(None)
    with pytest.raises(UserError, match="no folder 'text_encoder'"):
        sd3(tmp_path)
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "text_encoder" / "model.safetensors").unlink()
    torch.save({}, broken / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled"):
        sd3(broken)
    with pytest.raises(UserError, match="text dtype"):
        sd3(folder, dtype="float8")
    empty = shutil.copytree(folder, tmp_path / "empty")
    for name in ("tokenizer.json", "vocab.json"):
        (empty / "tokenizer_2" / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="tokenizer_2.*no tokenizer vocabulary"):
        sd3(empty)
    other = shutil.copytree(folder, tmp_path / "other")
    shutil.copy(folder / "text_encoder" / "model.safetensors", other / "text_encoder_3")
    with pytest.raises(UserError, match="text_encoder_3.*missing or misshaped"):
        sd3(other)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'lwd_jax\[text\]'"):
        sd3(folder)


# ------------------------------------------------------------------------------------------------ FLUX's encoders


@pytest.fixture(scope="module")
def flux_folder(folder, tmp_path_factory):
    """The same T5 and the first CLIP, where FluxPipeline has them."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("flux")
    for ours, theirs in (
        ("tokenizer", "tokenizer"),
        ("tokenizer_2", "tokenizer_3"),
        ("text_encoder_2", "text_encoder_3"),
    ):
        (root / ours).symlink_to(folder / theirs)
    clip = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    clip.save_pretrained(root / "text_encoder")
    return root


def test_flux_equals_the_diffusers_pipeline(flux_folder, folder):
    torch = pytest.importorskip("torch")
    import diffusers
    import transformers

    clip = transformers.CLIPTextModel.from_pretrained(flux_folder / "text_encoder")
    pipeline = diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1, axes_dims_rope=(4, 4, 8)
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=diffusers.AutoencoderKL(), text_encoder=clip,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(flux_folder / "tokenizer"),
        text_encoder_2=transformers.T5EncoderModel.from_pretrained(flux_folder / "text_encoder_2"),
        tokenizer_2=transformers.T5TokenizerFast.from_pretrained(flux_folder / "tokenizer_2"),
    )  # fmt: skip
    encoder = flux(flux_folder, max_length=40)
    states = encoder.encode(CAPTIONS)
    with torch.no_grad():
        tokens, pooled, _ = pipeline.encode_prompt(CAPTIONS, max_sequence_length=40)
    assert states.tokens.shape == tokens.shape == (4, 40, 48) and states.pooled.shape == (4, 16)
    assert (encoder.length, encoder.width, encoder.pooled) == (40, 48, 16) and states.mask.all()
    np.testing.assert_allclose(states.tokens, tokens.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(states.pooled, pooled.numpy(), rtol=1e-5, atol=1e-6)
    assert encoder.longer(CAPTIONS) == {"CLIP's 77 tokens": 1, "T5's 40 tokens": 1}
    encoder.tell_of_longer([])
    assert (kind_of(flux_folder), kind_of(folder)) == ("flux", "sd3")
    again = open_text_encoder(json.loads(json.dumps(encoder.describe())), flux_folder)
    assert again.fingerprint == encoder.fingerprint != flux(flux_folder, max_length=41).fingerprint


def test_flux_without_a_t5_is_refused(flux_folder, tmp_path):
    for part in ("tokenizer", "text_encoder", "tokenizer_2"):
        (tmp_path / part).symlink_to(flux_folder / part)
    with pytest.raises(UserError, match="no folder 'text_encoder_2', which FLUX's"):
        flux(tmp_path)
