"""Latents and text states of a dataset, made once and read in stage 2.

A folder of latents holds two stores, `pictures/` (mean and std) and `text/` (text states), a `metadata.json` that says
what made them, and the index file it names: which entry belongs to which record of the dataset. Entries are keyed by
content and by the weights that made them, so encoding a changed dataset again computes only what changed. metadata.json
is written last: without it the folder is not complete, and encoding again continues.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from etils.epath import Path

from lwd_jax.data import buckets
from lwd_jax.data.dataset import Dataset
from lwd_jax.data.pictures import UNREADABLE, decode, from_uint8
from lwd_jax.data.records import STORAGE, float_array, pack, unpack
from lwd_jax.data.store import Parts, Store, is_store
from lwd_jax.data.text import States, TextEncoder
from lwd_jax.errors import UserError, choose, read_json
from lwd_jax.files import locked, on_disk, write_whole

METADATA = "metadata.json"
STORES = ("pictures", "text")
_BESIDE = re.compile(r"\..*|index-.*\.npz")  # what a killed run, or the system, may leave beside the stores
FORMAT = 1
TEXT_BATCH = 16  # captions at a time
SAVE_SECONDS = 120.0  # work that a killed run may lose


@dataclass(frozen=True)
class Encoder:
    """The autoencoder that makes the latents.

    Attributes:
      fingerprint: of its weights.
      config: its configuration as a JSON object, with scaling, shift and latent_channels.
      encode: [B H W 3] uint8 -> (mean, std), float32 [B h w C], unscaled.
      dtype: of its arithmetic; latents made in another one are other latents.
    """

    fingerprint: str
    config: dict
    encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    dtype: str = "float32"


def make_posterior(module) -> Callable:
    """Jitted `f(params, pictures uint8 [B H W 3]) -> (mean, std)`, float32 [B h w C], unscaled, of an autoencoder.

    An autoencoder without a variance has std 0. `lwd encode` runs this, and `lwd plan` compiles it.
    """

    @jax.jit
    def posterior(params, pictures):
        mean, logvar = module.apply({"params": params}, from_uint8(pictures), method="encode")
        std = jnp.zeros_like(mean) if logvar is None else jnp.exp(0.5 * logvar)
        return mean.astype(jnp.float32), std.astype(jnp.float32)

    return posterior


@dataclass(frozen=True)
class Plan:
    """How a dataset is encoded.

    Attributes:
      resolution, keep_aspect: as Config.resolution and Config.data.buckets of the run that is to read it.
      smallest_bucket: buckets of fewer pictures are dissolved into their neighbours.
      batch_size: pictures encoded at a time.
      captions: alternatives kept of each picture, the first ones.
      storage: a row of records.STORAGE. float16 rounds by at most 2^-11 of a value and reaches 65504.
      save_seconds: time between writes.
    """

    resolution: int
    keep_aspect: bool = True
    smallest_bucket: int = 8
    batch_size: int = 4
    captions: int = 4
    storage: str = "float16"
    save_seconds: float = SAVE_SECONDS


class Outcome(NamedTuple):
    """What an encoding run did: entries made and taken over, and (name, reason) of pictures left out."""

    pictures_made: int
    pictures_kept: int
    texts_made: int
    texts_kept: int
    rejects: list[tuple[str, str]]


def _key(*parts) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def picture_key(sha256: str, size: tuple[int, int], fingerprint: str, storage: str, dtype: str) -> str:
    """The key of a picture's latent: its content, its bucket, the autoencoder and its arithmetic."""
    return _key("picture", FORMAT, sha256, size, fingerprint, storage, dtype)


def text_key(caption: str, fingerprint: str, storage: str) -> str:
    """The key of a caption's text states: its content and the text encoder."""
    return _key("text", FORMAT, caption, fingerprint, storage)


def _packed(name: str, values: np.ndarray, storage: str) -> np.ndarray:
    limit = float(np.finfo(np.float16 if storage == "float16" else np.float32).max)
    if not np.all(np.abs(values) <= limit):  # infinity and NaN fail too
        largest = float(np.max(np.abs(values)))
        raise UserError(
            f"The {name} reaches {largest:g}, which {storage} cannot hold; use --storage float32, or mend the model."
        )
    return pack(values, storage)


def _encode_texts(store: Store, captions: list[str], text: TextEncoder, storage: str, on_progress) -> tuple[int, int]:
    wanted = {text_key(caption, text.fingerprint, storage): caption for caption in captions}
    missing = [(key, caption) for key, caption in wanted.items() if key not in store.keys]
    text.tell_of_longer([caption for _, caption in missing])
    for start in range(0, len(missing), TEXT_BATCH):
        chunk = missing[start : start + TEXT_BATCH]
        states = text.encode([caption for _, caption in chunk])
        for row, (key, caption) in enumerate(chunk):
            arrays = {name: _packed("text state", values[row], storage) for name, values in states._asdict().items()}
            store.add(key, {"caption": caption, **arrays})
        on_progress("captions", start + len(chunk), len(missing))
    store.flush()
    return len(missing), len(wanted) - len(missing)


def _encode_pictures(store: Store, dataset: Dataset, sizes: list, encoder: Encoder, plan: Plan, on_progress):
    """Encodes what is missing, one bucket after the other; returns the rejects."""
    made_by = (encoder.fingerprint, plan.storage, encoder.dtype)
    keys = [picture_key(dataset.sha256[i].decode(), size, *made_by) for i, size in enumerate(sizes)]
    todo = defaultdict(list)
    for number, key in enumerate(keys):
        if key not in store.keys:
            todo[sizes[number]].append(number)
    done, total, rejects = 0, sum(map(len, todo.values())), []
    for size, numbers in todo.items():
        for start in range(0, len(numbers), plan.batch_size):
            chunk = numbers[start : start + plan.batch_size]
            pictures, readable = [], []
            for number in chunk:
                example = dataset[number]
                try:
                    pictures.append(decode(example.picture, size))
                    readable.append(number)
                except UNREADABLE as error:
                    rejects.append((example.name, f"cannot be read: {error}"))
            if readable:
                # One shape per bucket, so one program: the last batch is filled up.
                filled = pictures + [pictures[-1]] * (plan.batch_size - len(pictures))
                mean, std = encoder.encode(np.stack(filled))
                for row, number in enumerate(readable):
                    entry = {"mean": _packed("latent mean", mean[row], plan.storage)}
                    entry["std"] = _packed("latent standard deviation", std[row], plan.storage)
                    store.add(keys[number], entry)
            done += len(chunk)
            on_progress("pictures", done, total)
    store.flush()
    return keys, total - len(rejects), rejects


def encode_dataset(
    dataset: Dataset,
    out: str | os.PathLike,
    encoder: Encoder,
    text: TextEncoder,
    plan: Plan,
    on_progress: Callable[[str, int, int], None],
    overwrite: bool = False,
) -> Outcome:
    """Encodes a dataset into the folder `out`: every picture in its bucket (centre crop), and every caption.

    What `out` already holds under the same keys is kept; a run that was killed continues.

    Args:
      on_progress: called with ("captions" or "pictures", done, to do).
      overwrite: `out` may also hold what was made in another way (resolution, autoencoder, text encoder, storage); that
        is deleted when the new is complete.

    Raises:
      UserError: `out` is something else, was made in another way or is written to by another process; a resolution that
        does not divide; values that the storage cannot hold.
    """
    choose(STORAGE, plan.storage, "storage")
    if plan.captions < 1 or plan.batch_size < 1:
        raise UserError("At least one caption of a picture, and one picture at a time, must be encoded.")
    out = on_disk(out, "The folder of latents")
    described = None if overwrite else _describe(encoder, text, plan)
    _check_out(out, described)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, f"The folder of latents '{out}'"):
        _check_out(out, described)  # another process may have written meanwhile
        return _encode(dataset, out, encoder, text, plan, on_progress)


def _encode(dataset: Dataset, out: Path, encoder: Encoder, text: TextEncoder, plan: Plan, on_progress) -> Outcome:
    bucket_of, table = buckets.assign(
        dataset.heights, dataset.widths, plan.resolution, plan.keep_aspect, plan.smallest_bucket
    )
    sizes = [table[bucket] for bucket in bucket_of]
    captions = [_texts(captions, plan.captions) for captions in dataset.captions()]
    store, text_store = _open_stores(out, plan)
    distinct = ["", *(caption for each in captions for caption in each)]
    texts_made, texts_kept = _encode_texts(text_store, distinct, text, plan.storage, on_progress)
    keys, made, rejects = _encode_pictures(store, dataset, sizes, encoder, plan, on_progress)
    live = [number for number, key in enumerate(keys) if key in store.keys]
    if not live:
        name, reason = rejects[0]
        raise UserError(f"None of the {len(dataset)} pictures can be read; the first, {name}: {reason}.")

    def keys_of(texts) -> list[str]:
        return [text_key(caption, text.fingerprint, plan.storage) for caption in texts]

    def places(texts) -> np.ndarray:
        return np.array([text_store.keys[key] for key in keys_of(texts)], np.int64)

    content = _key(*((keys[number], *keys_of(captions[number])) for number in live), *keys_of([""]))
    index = {
        "latents": np.array([store.keys[keys[number]] for number in live], np.int64),
        "sizes": np.array([sizes[number] for number in live], np.int64),
        "sha256": dataset.sha256[live],
        "first_text": np.cumsum([0] + [len(captions[number]) for number in live]),
        "texts": places(caption for number in live for caption in captions[number]),
        "null_text": places([""])[0],
    }
    _finish(out, index, _describe(encoder, text, plan) | _contents(index, rejects) | {"content": content})
    store.prune(index["latents"][:, 0])
    text_store.prune([*index["texts"][:, 0], index["null_text"][0]])
    return Outcome(made, len(live) - made, texts_made, texts_kept, rejects)


def _open_stores(out: Path, plan: Plan) -> tuple[Store, Store]:
    """The stores of latents and of text states in `out`, empty or as an earlier run left them."""
    array_of = {rank: float_array(rank, plan.storage) for rank in (1, 2, 3)}
    latent = {"mean": array_of[3], "std": array_of[3]}
    states = {"caption": tfds.features.Text(), "tokens": array_of[2], "mask": array_of[1], "pooled": array_of[1]}
    text_store = Store(out / "text", "text", states, plan.save_seconds)
    return Store(out / "pictures", "latents", latent, plan.save_seconds), text_store


def _check_out(out: Path, described: dict | None) -> None:
    """Raises UserError if `out` holds something else than latents, or those of other makers than described (None = of
    any).
    """
    complete = (out / METADATA).is_file()
    if out.exists() and not complete:
        found = os.listdir(out) if out.is_dir() else [out.name]  # `iterdir` does not show files named NAME~
        if not all(_BESIDE.fullmatch(name) or (name in STORES and is_store(out / name)) for name in found):
            raise UserError(f"'{out}' exists and holds no latents; choose another --out.")
    if not complete or described is None:
        return
    before, now = (_makers(metadata) for metadata in (_read_metadata(out), described))
    for name, made in before.items():
        if made != now[name]:
            raise UserError(
                f"The latents in '{out}' were made with {name} {str(made)[:16]}, not {str(now[name])[:16]}: choose "
                "another --out, or add --overwrite to make them anew."
            )


def _makers(metadata: dict) -> dict:
    """What metadata.json says of what changes all latents, or all text states."""
    names = ("resolution", "buckets", "storage", "dtype", "autoencoder_fingerprint")
    text = metadata.get("text", {}).get("fingerprint")
    return {name: metadata.get(name) for name in names} | {"text_fingerprint": text}


def _read_metadata(folder: Path) -> dict:
    metadata = read_json(folder / METADATA)
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise UserError(f"The latents in '{folder}' have format {found}, but this version reads {FORMAT}.")
    return metadata


def _texts(captions: tuple[str, ...], count: int) -> tuple[str, ...]:
    return captions[:count] or ("",)  # a picture without a caption trains as unconditional


def _describe(encoder: Encoder, text: TextEncoder, plan: Plan) -> dict:
    """What metadata.json says of how the latents are made."""
    return {
        "format": FORMAT,
        "resolution": plan.resolution,
        "buckets": plan.keep_aspect,
        "storage": plan.storage,
        "autoencoder_fingerprint": encoder.fingerprint,
        "dtype": encoder.dtype,
        "autoencoder": encoder.config,
        "text": text.describe(),
    }


def _contents(index: dict, rejects: list) -> dict:
    """What metadata.json says of the latents themselves."""
    found, counts = np.unique(index["sizes"], axis=0, return_counts=True)
    return {
        "records": len(index["sizes"]),
        "shapes": [{"height": int(h), "width": int(w), "pictures": int(n)} for (h, w), n in zip(found, counts)],
        "rejects": rejects,
    }


def _finish(out: Path, index: dict, metadata: dict) -> None:
    """Writes the index under a name of its own, and then, at once, the metadata that names it."""
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(index[name]).tobytes() for name in sorted(index)))
    name = f"index-{digest.hexdigest()[:16]}.npz"
    content = io.BytesIO()
    np.savez(content, **index)
    write_whole(out / name, content.getvalue())
    text = json.dumps({**metadata, "index": name}, indent=1, ensure_ascii=False)
    write_whole(out / METADATA, text.encode())
    for old in out.iterdir():
        if old.name.startswith("index-") and old.name != name:
            old.unlink()


class Latents:
    """Random access to encoded records, in the order of their dataset.

    Attributes:
      metadata: what metadata.json says: autoencoder_fingerprint, autoencoder (its config), text (kind, fingerprint,
        length, width, pooled, settings), resolution, buckets, storage, dtype, records, shapes, rejects, content (a
        digest of every record's latent and text states, wherever they are stored).
      sizes: [N 2] (height, width) of each record's bucket, px.
      sha256: [N] hashes of the pictures, hexadecimal, as bytes.
    """

    def __init__(self, folder: Path, metadata: dict):
        self.folder = folder
        self.metadata = metadata
        with (folder / metadata["index"]).open("rb") as file, np.load(file) as index:
            self._index = {name: index[name] for name in index.files}
        self.sizes, self.sha256 = self._index["sizes"], self._index["sha256"].astype("S64")
        self._pictures, self._text = Parts(folder / "pictures"), Parts(folder / "text")
        self._pictures.check(self._index["latents"][:, 0])
        self._text.check(self._index["texts"][:, 0])
        self.null_text, _ = self._states(self._index["null_text"])

    def __len__(self) -> int:
        return len(self.sizes)

    def _unpack(self, values: np.ndarray) -> np.ndarray:
        return unpack(values, self.metadata["storage"])

    def _states(self, place) -> tuple[States, str]:
        record = self._text[place]
        return States(*(self._unpack(record[name]) for name in States._fields)), record["caption"].decode()

    def latent(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) of a record, float32 [h w C], unscaled."""
        record = self._pictures[self._index["latents"][number]]
        return self._unpack(record["mean"]), self._unpack(record["std"])

    def caption_count(self, number: int) -> int:
        """How many caption alternatives a record has, at least 1."""
        first = self._index["first_text"]
        return int(first[number + 1] - first[number])

    def text(self, number: int, alternative: int) -> tuple[States, str]:
        """Text states ([L D], [L], [P]) of one caption alternative of a record, and the caption."""
        return self._states(self._index["texts"][self._index["first_text"][number] + alternative])


def open_latents(folder: str | os.PathLike) -> Latents:
    """The latents that `lwd encode` wrote into `folder`.

    Raises:
      UserError: there is no such folder, it is something else, incomplete, or of another format.
    """
    folder = on_disk(folder, "The folder of latents")
    if not folder.is_dir():
        raise UserError(f"There is no folder of latents '{folder}'.")
    if not (folder / METADATA).is_file():
        state = (
            "is not complete: run the same lwd encode again" if (folder / "pictures").is_dir() else "holds no latents"
        )
        raise UserError(f"'{folder}' {state} (it has no {METADATA}).")
    metadata = _read_metadata(folder)
    try:
        return Latents(folder, metadata)
    except (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile) as error:
        raise UserError(f"'{folder}' is damaged ({error}); run lwd encode into a new folder.") from error


def check_autoencoder(latents: Latents, fingerprint: str) -> None:
    """Raises UserError, with both fingerprints, if another autoencoder made the latents."""
    made_by = latents.metadata["autoencoder_fingerprint"]
    if made_by != fingerprint:
        raise UserError(
            f"The latents in '{latents.folder}' were made by the autoencoder {made_by[:16]}, but this run decodes with "
            f"{fingerprint[:16]}; run lwd encode with the run's autoencoder."
        )


def check_text(latents: Latents, width: int, pooled: int) -> None:
    """Raises UserError if the text states have other widths than the backbone reads."""
    text = latents.metadata["text"]
    if (text["width"], text["pooled"]) != (width, pooled):
        raise UserError(
            f"The text states in '{latents.folder}' ({text['kind']}) are {text['width']} and pooled {text['pooled']} "
            f"wide, but the backbone reads {width} and {pooled}."
        )
