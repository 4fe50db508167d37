"""Files are there as a whole, or what was there before is."""

from __future__ import annotations

import json
import os

import pytest

from smp_ensemble.durable import append_line, sync_tree, write_json, write_whole


def test_a_file_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"name": "ä", "values": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": "ä", "values": [1, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"before")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_bytes() == b"before"
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Otherwise a power cut may leave the name, and nothing in it."""
    events = []
    flush, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("flush"), flush(handle))[1])
    monkeypatch.setattr(type(tmp_path), "replace", lambda own, to: (events.append("rename"), replace(own, to))[1])
    write_whole(tmp_path / "a", lambda file: file.write(b"content"))
    assert events == ["flush", "rename", "flush"]  # the file, and then the folder that names it


def test_lines_are_added_and_a_tree_is_flushed(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    for line in ("one", "two"):
        append_line(tmp_path / "folder" / "lines", line)
    assert (tmp_path / "folder" / "lines").read_text() == "one\ntwo\n"
    flushed = []
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (flushed.append(os.fstat(handle).st_ino), flush(handle))[1])
    sync_tree(tmp_path)
    assert set(flushed) == {path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))}
