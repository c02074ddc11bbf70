"""Where files lie: a name becomes a path in one place, and what a bucket cannot hold is refused with one sentence."""

import ast
import errno
import importlib.util
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import fsspec
import pytest
from bucket import Bucket, put_folder, serve

import lwd_jax
from lwd_jax import files
from lwd_jax.cli import main
from lwd_jax.errors import UserError
from lwd_jax.files import Spool, checksums, files_in, is_empty, locate, locked, on_disk, staged, write_whole

ROOT = Path(lwd_jax.__file__).parent


def test_whatever_opens_a_path_goes_through_epath():
    """No pathlib, no builtin open, and no glob, which reads the brackets in a folder's name."""
    wrong = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            called = node.func if isinstance(node, ast.Call) else None
            names += [f"{called.id}()"] if isinstance(called, ast.Name) else []
            names += [f".{called.attr}()"] if isinstance(called, ast.Attribute) and called.attr in ("rglob",) else []
            wrong += [f"{path.name}: {name}" for name in names if name in ("pathlib", "open()", ".rglob()")]
    assert not wrong


@pytest.fixture
def without_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gcsfs" else found(name, *a))


def test_without_the_extra_an_address_is_one_sentence(without_extra, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for words in (
        ["train", "--config=config.json", "--workdir=gs://bucket/run"],
        ["export", "--workdir=gs://bucket/run", "--out=out"],
        ["sample", "--models=gs://bucket/run", "--prompt=a", "--out=out"],
    ):
        assert main(words) == 2
        assert capsys.readouterr().err == (
            "lwd: 'gs://bucket/run' is in a bucket, which needs the extra [gcs]: pip install 'lwd_jax[gcs]'.\n"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["s3://bucket/run", "http://host/run", "gs://", "gs:///"])
def test_another_kind_of_address_is_refused(name):
    with pytest.raises(UserError, match="is no address that can be opened"):
        locate(name)


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "--images=images", "--out=gs://bucket/data"],
        ["prepare", "--images=gs://bucket/images", "--out=out"],
        ["encode", "--dataset=gs://bucket/data", "--models=vae", "--out=out"],
        ["doctor", "--latents=gs://bucket/latents"],
        ["quickstart", "--workdir=gs://bucket/run"],
    ],
)
def test_what_needs_a_disk_says_so(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "must be on a disk, but 'gs://bucket/" in said and "mount the bucket" in said
    assert not list(tmp_path.iterdir())


def test_a_folder_with_brackets_in_its_name(tmp_path):
    folder = tmp_path / "run [1]"
    with staged(on_disk(folder, "It")) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "a").write_text("1")
    assert [path.name for path in files_in(locate(folder))] == ["a"]
    assert not is_empty(locate(folder)) and is_empty(locate(tmp_path / "nothing"))


def test_a_backup_file_is_content(tmp_path):
    """epath does not list it; a folder that holds one is not to be replaced."""
    (tmp_path / "notes~").write_text("mine")
    assert not is_empty(locate(tmp_path))


@pytest.mark.parametrize("size", [0, 15, 16, 17, 50])
def test_checksums_are_of_whole_files(tmp_path, monkeypatch, size):
    """Which are read in blocks."""
    monkeypatch.setattr(files, "_BLOCK", 16)
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    assert checksums(locate(tmp_path)) == {"file": (size, zlib.crc32(content))}


def test_a_spool_of_a_folder_is_the_folder(tmp_path):
    spool = Spool(locate(tmp_path))
    (spool.here / "a").write_text("1")
    spool.push()
    spool.close()
    assert (tmp_path / "a").read_text() == "1"


def test_a_spool_of_a_bucket_writes_what_has_grown():
    objects = serve()
    spool = Spool(locate("gs://spool/run"))
    with (spool.here / "rows").open("a") as file:
        for text in ("1\n", "2\n"):
            file.write(text)
            file.flush()
            spool.push()
    assert objects["spool", "run/rows"][0] == b"1\n2\n"
    before = objects["spool", "run/rows"][1]
    spool.close()
    assert objects["spool", "run/rows"][1] == before and not spool.here.exists()


WAYS = {
    "train": ["train", "--config=configs/quickstart_stage2.py", "--workdir=gs://closed/{}"],
    "sample": ["sample", "--models=gs://closed/{}", "--prompt=a", "--out=out"],
    "export": ["export", "--workdir=gs://closed/{}", "--out=out"],
}


@pytest.mark.parametrize("words", WAYS.values(), ids=WAYS)
def test_a_bucket_that_does_not_let_in_is_not_an_empty_one(words, monkeypatch, capsys):
    """Nor is one that does not answer: a run that finds no checkpoints begins anew."""
    objects = serve()
    name = f"run of {words[0]}"
    refused = {"error": {"code": 403, "message": "You may not list this."}}
    monkeypatch.setattr(Bucket, "list", lambda self, bucket: self.answer(403, refused))
    monkeypatch.chdir(ROOT.parent)
    assert main([word.format(name) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"lwd: 'gs://closed/{name}' cannot be reached: ") and "You may not list this." in said
    assert said.count("\n") == 1 and not [key for key in objects if key[0] == "closed"]


def test_a_network_that_is_down_is_told(monkeypatch):
    serve()
    client = fsspec.filesystem("gcs")
    answers = [OSError("Cannot connect to host"), ConnectionResetError()]
    monkeypatch.setattr(client, "ls", lambda address: (_ for _ in ()).throw(answers.pop(0)))
    with pytest.raises(UserError, match="^'gs://far/away' cannot be reached: Cannot connect to host[.]$"):
        locate("gs://far/away")
    with pytest.raises(UserError, match="cannot be reached: ConnectionResetError[.]$"):  # it is asked again
        locate("gs://far/away")


def test_a_folder_in_a_bucket_is_listed_by_one_question(tmp_path, monkeypatch):
    """However much it holds, since each takes a while to answer; and the files are those of a folder on a disk."""
    objects = serve()
    for name in ("b", "deep/a", "deep/er/c", "deeper"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(name)
    put_folder(tmp_path / "run", "gs://listed/run")
    objects["listed", "run/deep/empty/"] = (b"", 1)
    objects["listed", "run2/other"] = (b"1", 1)
    places = locate("gs://listed/run"), locate(tmp_path / "run")
    asked, parse = [], Bucket.parse_request
    monkeypatch.setattr(Bucket, "parse_request", lambda self: parse(self) and not asked.append(self.path))
    there, here = map(checksums, places)
    assert len(asked) == 1
    assert list(there) == list(here) == ["b", "deep/a", "deep/er/c", "deeper"]
    assert [size for size, _ in there.values()] == [size for size, _ in here.values()] == [1, 6, 9, 6]
    assert [str(path) for path in files_in(locate("gs://listed/run"))] == [f"gs://listed/run/{name}" for name in here]
    assert files_in(locate("gs://listed/nothing")) == [] == files_in(locate(tmp_path / "nothing"))
    assert checksums(locate("gs://listed/nothing")) == {}


def test_a_result_in_a_bucket_has_its_marker_last():
    objects = serve()
    target = locate("gs://staged/out")
    for text in ("one", "two"):
        with staged(target, "a.json") as folder:
            (folder / "a.json").write_text(text)
            (folder / text).write_text(text)
    assert sorted(name for place, name in objects if place == "staged") == ["out/a.json", "out/two"]
    assert objects["staged", "out/a.json"][1] > objects["staged", "out/two"][1]
    with pytest.raises(RuntimeError), staged(locate("gs://staged/no"), "a.json") as folder:
        (folder / "a.json").write_text("half")
        raise RuntimeError
    assert ("staged", "no/a.json") not in objects


def test_no_client_remembers_folders_whoever_makes_it():
    """Also one that is made before an address is named here."""
    pytest.importorskip("gcsfs")
    code = "import fsspec, lwd_jax.files; print(fsspec.filesystem('gcs', token='anon').dircache.use_listings_cache)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path):
    holding = (
        "import sys, time; from lwd_jax.files import locate, locked\n"
        f"with locked(locate({str(tmp_path)!r}), 'It'):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="The workdir is being written to by another process"):
            with locked(tmp_path, "The workdir"):
                raise AssertionError("it is locked")
        other.kill()
    with locked(tmp_path, "The workdir"):
        pass


def test_where_there_are_no_locks_nothing_is_held(tmp_path, monkeypatch, caplog):
    """As on NFS without its lock daemon."""

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path, "It"), locked(tmp_path, "It"):
        pass
    assert len(caplog.messages) == 2 and f"'{tmp_path}' cannot be locked (No locks available)" in caplog.text


def test_a_name_that_is_empty():
    for find in (locate, lambda name: on_disk(name, "It")):
        with pytest.raises(UserError, match="empty"):
            find("")


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = locate(tmp_path / "notes.json")
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:1])
        raise OSError("no space left")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, b"later")
    assert path.read_bytes() == b"new" and files_in(locate(tmp_path)) == [path]
