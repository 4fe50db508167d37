"""What strangers' files may hold."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_ensemble.untrusted import MOST_DEPTH, is_inside, read_json, read_limited, shorten


@given(st.text(alphabet="abCON.1/\\: ~_-+\0", max_size=12) | st.text(max_size=12))
def test_a_name_that_is_inside_is_so_by_every_system(name):
    if not is_inside(name):
        return
    for pure in (PurePosixPath(name), PureWindowsPath(name)):
        assert not pure.is_absolute()
        assert not pure.drive
        assert ".." not in pure.parts
        assert pure.as_posix() == name
    assert name.isascii()


@given(st.lists(st.from_regex(r"[a-z0-9_]{4,12}", fullmatch=True), min_size=1, max_size=4))
def test_plain_names_are_inside(parts):
    reserved = {f"{word}{digit}" for word in ("com", "lpt") for digit in range(10)}
    assert is_inside("/".join(parts)) == (not reserved & set(parts))


def test_names_that_we_write_are_inside():
    for name in ("MLmodel", "members/00/model.safetensors", "code/smp_ensemble-0.1.0+local.dist-info/entry_points.txt"):
        assert is_inside(name)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_limited(path, 5) == b"12345"
    with pytest.raises(ValueError, match="expected at most 4 bytes, found 5"):
        read_limited(path, 4)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ValueError, match="found a symbolic link"):
        read_limited(tmp_path / "link", 5)
    assert read_limited(tmp_path / "link", 5, links=True) == b"12345"
    with pytest.raises(ValueError, match="expected a regular file, found something else"):
        read_limited(tmp_path, 5)
    with pytest.raises(FileNotFoundError):
        read_limited(tmp_path / "none", 5)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no endless device")
def test_an_endless_device_is_no_file():
    with pytest.raises(ValueError, match="expected a regular file"):
        read_limited(Path("/dev/zero"), 5)


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


def test_json_has_bounds(tmp_path):
    path = tmp_path / "a.json"
    for good in (nested(MOST_DEPTH), '{"a": [1.5, null, "\\u00e9"]}', str(2**63 - 1)):
        path.write_text(good)
        assert read_json(path, 1000) == json.loads(good)
    for bad, message in (
        (nested(MOST_DEPTH + 1), "levels"),
        (nested(100_000), "levels"),
        ("1" * 5000, "digits"),
        (f'"{"x" * 5000}"', "characters"),
        ('"\\ud800"', "surrogates"),
        ('{"\\ud800": 1}', "surrogates"),
        ("nope", "Expecting value"),
        ("", "Expecting value"),
    ):
        path.write_text(bad)
        with pytest.raises(ValueError, match=message):
            read_json(path, 1_000_000)


@given(st.text(max_size=500))
def test_an_error_is_one_short_line(text):
    short = shorten(text, 50)
    assert len(short) <= 50
    assert len(short.splitlines()) <= 1
