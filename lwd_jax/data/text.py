"""Captions to text states, the conditioning that stage 2 trains on."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from etils.epath import Path

from lwd_jax.errors import UserError, choose, read_json
from lwd_jax.files import on_disk

SD3_WIDTH = 4096  # of T5-XXL; taken where neither T5 nor a transformer/config.json is there to tell
_HASHED = (".safetensors", ".json", ".txt", ".model")  # what a text encoder's output depends on
_CLIPS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))  # of SD3; FLUX's second is a T5
_T5 = ("text_encoder_3", "tokenizer_3")
_TOGETHER = 1000  # captions whose tokens are counted at a time
log = logging.getLogger(__name__)


class States(NamedTuple):
    """Text states, float32: tokens [B L D]; mask [B L], 1 where a token is real; pooled [B P]."""

    tokens: np.ndarray
    mask: np.ndarray
    pooled: np.ndarray


@dataclass(frozen=True)
class TextEncoder:
    """An opened text encoder.

    Attributes:
      kind: a row of TEXT_ENCODERS.
      fingerprint: of everything its states depend on.
      length, width, pooled: L, D and P of its states.
      settings: what it was opened with, besides its folder; `open_text_encoder` takes them back.
      notice: one sentence for the user about what it is.
      encode: captions -> States.
      longer: captions -> how many do not fit, by what they do not fit into: {"CLIP's 77 tokens": 3}.
    """

    kind: str
    fingerprint: str
    length: int
    width: int
    pooled: int
    settings: dict
    notice: str
    encode: Callable[[list[str]], States]
    longer: Callable[[list[str]], dict[str, int]]

    def describe(self) -> dict:
        """What is written beside latents and exported models; a JSON object that `open_text_encoder` reads."""
        names = ("kind", "fingerprint", "length", "width", "pooled", "settings")
        return {name: getattr(self, name) for name in names}

    def tell_of_longer(self, captions: list[str]) -> None:
        """Warns of captions whose ends are not read."""
        counts = Counter()
        for start in range(0, len(captions), _TOGETHER):
            counts.update(self.longer(captions[start : start + _TOGETHER]))
        for room, count in counts.items():
            if count:
                log.warning(
                    "%d of %d captions are longer than %s: their ends are not read.", count, len(captions), room
                )


def _signs(word: str, width: int) -> np.ndarray:
    bits = np.frombuffer(hashlib.shake_256(word.encode()).digest(-(-width // 8)), np.uint8)
    return np.unpackbits(bits)[:width].astype(np.float32) * 2 - 1


def _check_sizes(*sizes: int) -> None:
    if min(sizes) < 1:
        raise UserError(
            f"Text states must have at least one token and a width of at least 1, but {min(sizes)} is asked."
        )


def hashed_words(folder: Path | None, length: int = 32, width: int = 128, pooled: int = 128) -> TextEncoder:
    """A stand-in that needs no weights: each word is a vector of signs drawn from its hash.

    It tells captions and their words apart, and knows nothing of what they mean. The first token marks the beginning;
    the pooled vector is the sum of the word vectors over the square root of their number (0 for no words). Words are
    cut at `length` - 1, lower-cased, and stripped of punctuation.

    Args:
      folder: not read.

    Raises:
      UserError: a size below 1.
    """
    _check_sizes(length, width, pooled)

    def words_of(caption: str) -> list[str]:
        stripped = (word.strip(".,;:!?\"'()[]") for word in caption.lower().split())
        return ["", *filter(None, stripped)]

    def longer(captions: list[str]) -> dict[str, int]:
        return {f"{length - 1} words": sum(len(words_of(caption)) > length for caption in captions)}

    def encode(captions: list[str]) -> States:
        tokens = np.zeros((len(captions), length, width), np.float32)
        mask = np.zeros((len(captions), length), np.float32)
        vectors = np.zeros((len(captions), pooled), np.float32)
        for row, caption in enumerate(captions):
            words = words_of(caption)[:length]
            mask[row, : len(words)] = 1
            for place, word in enumerate(words):
                tokens[row, place] = _signs(f"token {word}", width)
            if words[1:]:
                vectors[row] = sum(_signs(f"pooled {word}", pooled) for word in words[1:]) / len(words[1:]) ** 0.5
        return States(tokens, mask, vectors)

    return TextEncoder(
        kind="hashed_words",
        fingerprint=hashlib.sha256(f"hashed_words 1 {length} {width} {pooled}".encode()).hexdigest(),
        length=length,
        width=width,
        pooled=pooled,
        settings={"length": length, "width": width, "pooled": pooled},
        notice="hashed_words tells words apart but knows nothing of their meaning: a stand-in for a text encoder.",
        encode=encode,
        longer=longer,
    )


def _fingerprint(kind: str, folder: Path, parts: list[str], settings: dict) -> str:
    digest = hashlib.sha256(json.dumps([kind, settings], sort_keys=True).encode())
    for part in parts:
        for path in sorted((folder / part).iterdir()):
            if path.suffix in _HASHED:
                digest.update(f"{part}/{path.name} {os.path.getsize(path)} ".encode())
                with path.open("rb") as file:
                    while chunk := file.read(1 << 24):
                        digest.update(chunk)
    return digest.hexdigest()


def _load_model(cls, folder: Path, dtype):
    """A transformers model from a local folder: safetensors only, and every tensor must be there."""
    if not any(path.suffix == ".safetensors" for path in folder.iterdir()):
        raise UserError(f"'{folder}' has no safetensors weights; pickled weights are not read, convert them first.")
    try:
        model, info = cls.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"'{folder}' cannot be loaded as {cls.__name__}: {str(error).splitlines()[0]}") from error
    # transformers itself fills what is missing with random numbers.
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise UserError(
            f"'{folder}' is no {cls.__name__}: {len(absent)} tensors are missing or misshaped, such as {absent[0]}."
        )
    return model


def _load_tokenizer(cls, folder: Path, vocabularies: tuple[str, ...]):
    """A transformers tokenizer from a local folder; without a vocabulary, transformers would make an empty one."""
    if not any((folder / name).is_file() for name in vocabularies):
        raise UserError(f"'{folder}' has no tokenizer vocabulary ({' or '.join(vocabularies)}).")
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"'{folder}' cannot be loaded as {cls.__name__}: {str(error).splitlines()[0]}") from error


def _t5_width(folder: Path) -> int:
    config = folder / "transformer" / "config.json"
    return read_json(config)["joint_attention_dim"] if config.is_file() else SD3_WIDTH


def _ids(captions: list[str], model, tokenizer, length: int):
    """Token numbers, cut and padded to `length`, where the model is."""
    padded = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return padded.input_ids.to(model.device)


def _counter(rooms: dict[str, tuple]) -> Callable:
    """TextEncoder.longer of {"CLIP's 77 tokens": (tokenizer, 77)}."""

    def count(captions: list[str], tokenizer, length: int) -> int:
        if not captions:  # which tokenizers do not take
            return 0
        return sum(len(ids) > length for ids in tokenizer(captions, truncation=True, max_length=length + 1).input_ids)

    return lambda captions: {name: count(captions, *room) for name, room in rooms.items()}


def _numpy(states) -> np.ndarray:
    return states.float().cpu().numpy()


def _sd3_states(captions: list[str], clips, t5, clip_length: int, max_length: int, width: int) -> States:
    """`clips`, `t5`: (model, tokenizer) each; t5 may be None."""
    tokens = np.zeros((len(captions), clip_length + max_length, width), np.float32)
    pooled, start = [], 0
    for model, tokenizer in clips:
        result = model(_ids(captions, model, tokenizer, clip_length), output_hidden_states=True)
        states = _numpy(result.hidden_states[-2])
        tokens[:, :clip_length, start : start + states.shape[-1]] = states
        start += states.shape[-1]
        pooled.append(_numpy(result.text_embeds))
    if t5:
        tokens[:, clip_length:] = _numpy(t5[0](_ids(captions, *t5, max_length))[0])
    return States(tokens, np.ones(tokens.shape[:2], np.float32), np.concatenate(pooled, axis=-1))


def _checked(whose: str, folder: Path | None) -> Path:
    if folder is None:
        raise UserError(f"{whose} text encoders are read from a folder; name it with --text-models.")
    return on_disk(folder, "The folder of text encoders")


def _parts(whose: str, folder: Path, pairs) -> list[str]:
    """The names of the folders that pairs of an encoder and a tokenizer are read from."""
    parts = [part for pair in pairs for part in pair]
    for part in parts:
        if not (folder / part).is_dir():
            raise UserError(f"'{folder}' has no folder '{part}', which {whose} text encoders need.")
    return parts


def _opener(whose: str, folder: Path, dtype: str) -> Callable:
    """`f(model class, tokenizer class, folder names, vocabulary files) -> (model, tokenizer)`, ready to run; classes by
    their names in transformers.

    Raises:
      UserError: the extra [text] is not installed, an unknown dtype; when called: a folder is not what it should be.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"{whose} text encoders need the extra [text]: pip install 'lwd_jax[text]'.") from error
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    weights = choose(types, dtype, "text dtype")
    transformers.logging.set_verbosity_error()  # its warnings about weights are errors here
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def pair(model_class, tokenizer_class, names, *vocabularies):
        model = _load_model(getattr(transformers, model_class), folder / names[0], weights).to(device).eval()
        tokenizer = getattr(transformers, tokenizer_class)
        return model, _load_tokenizer(tokenizer, folder / names[1], ("tokenizer.json", *vocabularies))

    return pair


def _inferred(encode: Callable) -> Callable:
    """Without gradients; torch is there by now."""
    import torch

    return torch.inference_mode()(encode)


def sd3(folder: Path | None, max_length: int = 256, dtype: str = "float32") -> TextEncoder:
    """SD3's three text encoders (arXiv 2403.03206, section 4 and appendix B.2), through transformers.

    The penultimate states of CLIP-L and OpenCLIP bigG, 77 tokens each, side by side and zero-padded to T5's width;
    behind them T5's states. Every token counts as real: SD3 attends to padding too. Without a text_encoder_3 folder
    T5's states are zeros. The pooled vector is the two CLIPs' projections, one after the other. They run on a GPU if
    torch sees one.

    Args:
      folder: a diffusers pipeline folder: text_encoder, text_encoder_2, text_encoder_3, tokenizer, tokenizer_2,
        tokenizer_3.
      max_length: T5's tokens.
      dtype: of the encoders' weights and arithmetic: float32, bfloat16, float16.

    Raises:
      UserError: the extra [text] is not installed; a folder is missing, or is not what it should be.
    """
    _check_sizes(max_length)
    folder = _checked("SD3's", folder)
    has_t5 = (folder / _T5[0]).is_dir()
    parts = _parts("SD3's", folder, (*_CLIPS, _T5) if has_t5 else _CLIPS)
    pair = _opener("SD3's", folder, dtype)
    clips = [pair("CLIPTextModelWithProjection", "CLIPTokenizer", names, "vocab.json") for names in _CLIPS]
    t5 = pair("T5EncoderModel", "T5TokenizerFast", _T5, "spiece.model") if has_t5 else None
    clip_length = clips[0][1].model_max_length
    width = t5[0].config.d_model if t5 else _t5_width(folder)
    pooled = sum(model.config.projection_dim for model, _ in clips)
    clip_width = sum(model.config.hidden_size for model, _ in clips)
    if clip_width > width:
        raise UserError(f"In '{folder}' the CLIP states are {clip_width} wide together, which exceeds T5's {width}.")
    settings = {"max_length": max_length, "dtype": dtype}

    @_inferred
    def encode(captions: list[str]) -> States:
        return _sd3_states(captions, clips, t5, clip_length, max_length, width)

    rooms = {f"CLIP's {clip_length} tokens": (clips[0][1], clip_length)}
    if t5:
        rooms[f"T5's {max_length} tokens"] = (t5[1], max_length)
    return TextEncoder(
        kind="sd3",
        fingerprint=_fingerprint("sd3", folder, parts, settings),
        length=clip_length + max_length,
        width=width,
        pooled=pooled,
        settings=settings,
        notice=f"SD3's text encoders from '{folder}'{'' if t5 else ', without T5 (its states are zeros)'}.",
        encode=encode,
        longer=_counter(rooms),
    )


def flux(folder: Path | None, max_length: int = 512, dtype: str = "float32") -> TextEncoder:
    """FLUX.1's two text encoders, through transformers: T5's states, and CLIP-L's pooled vector.

    Every token counts as real: FLUX attends to padding too. They run on a GPU if torch sees one.

    Args:
      folder: a diffusers pipeline folder: text_encoder (CLIP), text_encoder_2 (T5), tokenizer, tokenizer_2.
      max_length: T5's tokens; FLUX.1-schnell was trained with 256.
      dtype: of the encoders' weights and arithmetic: float32, bfloat16, float16.

    Raises:
      UserError: the extra [text] is not installed; a folder is missing, or is not what it should be.
    """
    _check_sizes(max_length)
    folder = _checked("FLUX's", folder)
    parts = _parts("FLUX's", folder, _CLIPS)
    pair = _opener("FLUX's", folder, dtype)
    clip = pair("CLIPTextModel", "CLIPTokenizer", _CLIPS[0], "vocab.json")
    t5 = pair("T5EncoderModel", "T5TokenizerFast", _CLIPS[1], "spiece.model")
    settings = {"max_length": max_length, "dtype": dtype}

    @_inferred
    def encode(captions: list[str]) -> States:
        pooled = _numpy(clip[0](_ids(captions, *clip, clip[1].model_max_length)).pooler_output)
        tokens = _numpy(t5[0](_ids(captions, *t5, max_length))[0])
        return States(tokens, np.ones(tokens.shape[:2], np.float32), pooled)

    room = clip[1].model_max_length
    rooms = {f"CLIP's {room} tokens": (clip[1], room), f"T5's {max_length} tokens": (t5[1], max_length)}
    return TextEncoder(
        kind="flux",
        fingerprint=_fingerprint("flux", folder, parts, settings),
        length=max_length,
        width=t5[0].config.d_model,
        pooled=clip[0].config.hidden_size,
        settings=settings,
        notice=f"FLUX's text encoders from '{folder}'.",
        encode=encode,
        longer=_counter(rooms),
    )


TEXT_ENCODERS = {"hashed_words": hashed_words, "sd3": sd3, "flux": flux}


def kind_of(folder: Path) -> str:
    """Whose text encoders a pipeline folder has: FLUX's second is a T5, SD3's a CLIP."""
    config = folder / "text_encoder_2" / "config.json"
    return "flux" if config.is_file() and read_json(config).get("model_type") == "t5" else "sd3"


def open_text_encoder(text: dict, folder: Path | None = None) -> TextEncoder:
    """The text encoder that a description names.

    Args:
      text: {"kind": a row of TEXT_ENCODERS} or that with "settings", as `TextEncoder.describe` writes it.
      folder: where its weights are, if it has any.

    Raises:
      UserError: an unknown kind, or weights that cannot be read.
    """
    settings = text.get("settings", {})
    return choose(TEXT_ENCODERS, text["kind"], "text encoder")(folder, **settings)
