"""An output folder is there whole, or as it was before."""

import pytest
from etils.epath.gpath import PosixGPath as Path

from lwd_jax.errors import UserError
from lwd_jax.report.staging import check_free, staged


def write(folder, text, overwrite=False):
    with staged(folder, overwrite, "result.txt") as partial:
        (partial / "result.txt").write_text(text)


def test_it_appears_whole_and_replaces_only_when_asked(tmp_path):
    out = tmp_path / "deep" / "out"
    write(out, "one")
    with pytest.raises(UserError, match="--overwrite"):
        write(out, "two")
    write(out, "two", overwrite=True)
    assert (out / "result.txt").read_text() == "two" and [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_error_leaves_what_was_there(tmp_path):
    write(tmp_path / "out", "one")
    with pytest.raises(RuntimeError), staged(tmp_path / "out", True, "result.txt") as partial:
        (partial / "result.txt").write_text("two")
        raise RuntimeError
    assert (tmp_path / "out" / "result.txt").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_earlier_result_comes_back_when_it_cannot_be_replaced(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename
    write(out, "one")

    def fail(path, target):
        if path.suffix == ".partial":
            raise OSError(28, "No space left on device", str(target))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space"):
        write(out, "two", overwrite=True)
    assert (out / "result.txt").read_text() == "one" and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out", "out/photos", "out/deep/run", "link/photos", "out/../out/photos"])
def test_what_a_command_reads_is_not_overwritten(tmp_path, name):
    write(tmp_path / "out", "one")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match=f"out is not overwritten: '{tmp_path}/{name}', which this command reads"):
        check_free(tmp_path / "out", True, "result.txt", ["", tmp_path / "other", tmp_path / name])


def test_what_lies_elsewhere_may_be_read(tmp_path):
    write(tmp_path / "out", "one")
    check_free(tmp_path / "out", True, "result.txt", ["", tmp_path, tmp_path / "out2", "gs://bucket/out"])
    check_free(tmp_path / "new", False, "result.txt", [tmp_path / "new" / "photos"])
    write(tmp_path / "out", "two", overwrite=True)
    assert (tmp_path / "out" / "result.txt").read_text() == "two"
