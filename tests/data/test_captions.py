"""Laws of captions: where they are found, and what is refused."""

import json

import pytest

from lwd_jax.data.captions import find_captions
from lwd_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg", "sub/d.jpg", "e.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_bytes("\ufeffa  lighthouse \n\n\nein Leuchtturm, größer\r\n".encode())
    (tmp_path / "a.json").write_text(json.dumps({"caption": "from json"}))
    (tmp_path / "b.json").write_text(json.dumps({"text": ["one", " ", "two"]}))
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.jpg", "text": "from metadata"}\n\n{"file_name": "c.jpg", "caption": "three"}\n'
    )
    (tmp_path / "sub" / "metadata.jsonl").write_text('{"file_name": "d.jpg", "text": "four"}')
    return tmp_path


def pictures(folder):
    return sorted(folder.rglob("*.jpg"))


def test_each_source(folder):
    found = {path.stem: captions for path, captions in zip(pictures(folder), find_captions(folder, pictures(folder)))}
    assert found == {
        "a": ("a lighthouse", "ein Leuchtturm, größer"),
        "b": ("one", "two"),
        "c": ("three",),
        "d": ("four",),
        "e": (),
    }


def test_a_chosen_source_alone_counts(folder):
    assert find_captions(folder, pictures(folder), "json")[0] == ("from json",)
    assert find_captions(folder, pictures(folder), "metadata")[0] == ("from metadata",)
    assert find_captions(folder, pictures(folder), "txt")[1:] == [()] * 4


@pytest.mark.parametrize("field", ["caption", "captions", "text", "prompt"])
@pytest.mark.parametrize("value, expected", [("x", ("x",)), (["x", "y"], ("x", "y")), ("", ())])
def test_json_fields(tmp_path, field, value, expected):
    (tmp_path / "p.png").touch()
    (tmp_path / "p.json").write_text(json.dumps({field: value, "other": 1}))
    assert find_captions(tmp_path, [tmp_path / "p.png"]) == [expected]


def test_of_several_json_fields_the_first_counts(tmp_path):
    fields = ["captions", "caption", "text", "prompt"]
    for start, first in enumerate(fields):
        (tmp_path / "p.json").write_text(json.dumps({field: f"of {field}" for field in reversed(fields[start:])}))
        assert find_captions(tmp_path, [tmp_path / "p.png"]) == [(f"of {first}",)]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.txt", b"\xff\xfe\x00bad", "UTF-8"),
        ("p.json", b"{", "not valid JSON"),
        ("p.json", b"[1]", "JSON object"),
        ("p.json", b'{"caption": 3}', "'caption'"),
        ("p.json", b'{"caption": "half \\ud800"}', r"is not Unicode text: 'half \\ud800'"),
        ("metadata.jsonl", b'{"file_name": "p.png", "text": ["a", "\\udfff"]}', "line 1, is not Unicode text"),
        ("metadata.jsonl", b'{"file_name": "p.png", "text": "x"}\n{"text": "x"}', "line 2"),
    ],
)
def test_broken_caption_files_are_named(tmp_path, name, content, words):
    (tmp_path / "p.png").touch()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        find_captions(tmp_path, [tmp_path / "p.png"])
    assert name in str(caught.value)


@pytest.mark.parametrize("name, content", [("p.TXT", "found"), ("p.JSON", '{"text": "found"}')])
def test_suffixes_in_capitals(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert find_captions(tmp_path, [tmp_path / "p.JPG"]) == [("found",)]


def test_a_line_of_text_may_hold_it_too(tmp_path):
    """Windows' and old Macintoshes' line ends are line ends."""
    (tmp_path / "a.txt").write_bytes("one\u2028two\r\nthree\rfour\n".encode())
    assert find_captions(tmp_path, [tmp_path / "a.png"]) == [("one two", "three", "four")]


def test_a_line_of_json_may_hold_what_python_takes_for_a_line_end(tmp_path):
    text = "one\u2028two\u0085three"
    line = json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(f"{line}\r\n".encode())
    picture = tmp_path / "a.png"
    assert [found[0].split() for found in find_captions(tmp_path, [picture])] == [text.split()]
