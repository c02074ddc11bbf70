"""Captions beside pictures: NAME.txt, NAME.json, or a metadata.jsonl."""

import json

from etils.epath import Path

from lwd_jax.errors import UserError, check_unicode, read_text
from lwd_jax.files import files_in

SOURCES = ("auto", "txt", "json", "metadata")
FIELDS = ("captions", "caption", "text", "prompt")  # of JSON; the first that is there counts
METADATA = "metadata.jsonl"


def _parse(text: str, where: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"The caption file {where} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"The caption file {where} should hold a JSON object, but holds a {type(value).__name__}.")
    return value


def _captions(value: dict, where: str) -> tuple[str, ...]:
    for field in FIELDS:
        if field in value:
            found = value[field] if isinstance(value[field], list) else [value[field]]
            if not all(isinstance(caption, str) for caption in found):
                raise UserError(f"In the caption file {where} the field '{field}' is neither text nor a list of texts.")
            what = f"A caption in {where}"
            return tuple(check_unicode(" ".join(caption.split()), what) for caption in found if caption.strip())
    return ()


def _beside(picture: Path, suffix: str) -> Path | None:
    """The file of that suffix, in small letters or capitals, that belongs to a picture."""
    paths = (picture.with_suffix(suffix), picture.with_suffix(suffix.upper()))
    return next((path for path in paths if path.is_file()), None)


def _from_txt(picture: Path) -> tuple[str, ...]:
    path = _beside(picture, ".txt")
    if path is None:
        return ()
    return tuple(" ".join(line.split()) for line in read_text(path).split("\n") if line.strip())


def _from_json(picture: Path) -> tuple[str, ...]:
    path = _beside(picture, ".json")
    return _captions(_parse(read_text(path), f"'{path}'"), f"'{path}'") if path is not None else ()


def _metadata(root: Path) -> dict[Path, tuple[str, ...]]:
    """Captions of every metadata.jsonl under `root`; file names are relative to the metadata's folder."""
    found = {}
    for path in (path for path in files_in(root) if path.name == METADATA):
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if line.strip():
                where = f"'{path}', line {number},"
                value = _parse(line, where)
                if not isinstance(value.get("file_name"), str):
                    raise UserError(f"The caption file {where} has no 'file_name'.")
                found[(path.parent / value["file_name"]).resolve()] = _captions(value, where)
    return found


def find_captions(root: Path, pictures: list[Path], source: str = "auto") -> list[tuple[str, ...]]:
    """The caption alternatives of each picture; () where there are none.

    A .txt holds one alternative per non-empty line; a .json and each line of a metadata.jsonl hold an object with
    `caption`, `captions`, `text` or `prompt`: a text or a list of texts.

    Args:
      root: the folder that is searched for metadata.jsonl.
      source: one of SOURCES; "auto" takes the first of .txt, .json and metadata.jsonl that has a caption.

    Raises:
      UserError: a caption file that is not UTF-8, not JSON, or of another form.
    """
    metadata = _metadata(root) if source in ("auto", "metadata") else {}
    readers = {
        "txt": _from_txt,
        "json": _from_json,
        "metadata": lambda picture: metadata.get(picture.resolve(), ()),
    }
    chosen = list(readers.values()) if source == "auto" else [readers[source]]
    return [next((captions for read in chosen if (captions := read(picture))), ()) for picture in pictures]
