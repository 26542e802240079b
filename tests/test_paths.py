"""Files are written whole or not at all, and what hinders that is one line that says what to do."""

import errno
import json

import pytest

from fpn_jax.errors import UserError, explain
from fpn_jax.storage import paths


def test_json_reads_back_and_what_it_lacks_is_refused(tmp_path):
    path = tmp_path / "deep" / "a.json"
    paths.write_json(path, {"AP": None, "steps": [1, 2]})
    assert json.loads(path.read_text()) == {"AP": None, "steps": [1, 2]}
    with pytest.raises(ValueError, match="JSON"):
        paths.write_json(path, {"AP": float("nan")})
    assert json.loads(path.read_text())["steps"] == [1, 2]
    paths.write_json(path, float("inf"), finite=False)
    assert json.loads(path.read_text()) == float("inf")


def test_a_folder_is_tried_before_it_is_needed(tmp_path, monkeypatch):
    paths.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/b: cannot be written \(Not a directory\)"):
        paths.check_writable(tmp_path / "file" / "b")

    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(paths.tempfile, "TemporaryFile", read_only)
    with pytest.raises(UserError, match=r"Read-only file system\); make it writable or choose another folder"):
        paths.check_writable(tmp_path / "a")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space or choose another folder"),
        (errno.EROFS, "make it writable or choose another folder"),
        (errno.EPERM, "make it writable or choose another folder"),
        (errno.ENOTDIR, "give another path"),
    ],
)
def test_the_remedy_fits_the_fault(number, remedy):
    assert explain(OSError(number, "so", "a/b")) == (f"error: a/b: so; {remedy}", 2)
