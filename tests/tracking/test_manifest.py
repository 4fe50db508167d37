"""The list of files: what sha256sum writes and checks, and nothing else is taken for it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess

import pytest

from smp_ensemble.exceptions import IntegrityError
from smp_ensemble.tracking.manifest import (
    MANIFEST_FILE,
    manifest_digest,
    read_manifest,
    verify_files,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path):
    for name, text in (("b.txt", "b"), ("code/a.py", ""), ("members/00/c", "c" * 1000), ("B.txt", "B")):
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "model"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_every_file_is_listed_in_order_and_comes_back(folder):
    (folder / "code" / "__pycache__").mkdir()
    (folder / "code" / "__pycache__" / "a.pyc").write_bytes(b"x")
    digest = write_manifest(folder)
    names = ["B.txt", "b.txt", "code/a.py", "members/00/c"]
    assert read_manifest(folder) == {name: sha256((folder / name).read_bytes()) for name in names}
    lines = (folder / MANIFEST_FILE).read_text().splitlines(keepends=True)
    assert [line.split()[1] for line in lines[:-1]] == names
    assert lines[-1] == f"# SHA-256 of the lines above: {digest}\n"
    assert digest == manifest_digest(folder) == sha256("".join(lines[:-1]).encode())
    assert write_manifest(folder) == digest
    verify_files(folder, read_manifest(folder), closed="code")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not on this system")
def test_sha256sum_reads_it_too(folder):
    write_manifest(folder)
    check = ["sha256sum", "--check", "--strict", "--quiet", MANIFEST_FILE]
    assert subprocess.run(check, cwd=folder, check=False).returncode == 0
    (folder / "b.txt").write_text("other")
    assert subprocess.run(check, cwd=folder, check=False, capture_output=True).returncode == 1


def with_digest(lines: str) -> bytes:
    return f"{lines}# SHA-256 of the lines above: {sha256(lines.encode())}\n".encode()


@pytest.mark.parametrize(
    "content",
    [
        with_digest(f"{'0' * 64}  ../outside\n"),
        with_digest(f"{'0' * 64}  /etc/passwd\n"),
        with_digest(f"{'0' * 64}  C:/a\n"),
        with_digest(f"{'0' * 64}  b\n{'0' * 64}  a\n"),
        with_digest(f"{'0' * 64}  a\n{'1' * 64}  a\n"),
        with_digest(f"{'0' * 64} *a\n"),
        with_digest(f"{'0' * 63}  a\n"),
        with_digest(f"{'0' * 64}  a\n\n"),
        with_digest(f"{'0' * 64}  a\r\n"),
        with_digest(f"{'0' * 64}  a\n").rstrip(b"\n"),
        with_digest(f"{'0' * 64}  a\n") + b"\n",
        b"",
        b"\n",
        b"\xff" * 100,
        b"# SHA-256 of the lines above: " + b"0" * 64,
    ],
)
def test_what_we_did_not_write_is_refused(tmp_path, content):
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(IntegrityError, match=MANIFEST_FILE):
        read_manifest(tmp_path)


def test_what_a_list_names_must_be_there_and_be_whole(folder):
    write_manifest(folder)
    files = read_manifest(folder)
    (folder / "b.txt").write_text("other")
    expected = f"{folder / 'b.txt'} was changed: expected SHA-256 {sha256(b'b')}, found {sha256(b'other')}"
    with pytest.raises(IntegrityError) as caught:
        verify_files(folder, files, closed="code")
    assert str(caught.value) == expected
    verify_files(folder, files, but=["b.txt"], closed="code")
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(IntegrityError, match=r"files.sha256 was changed: expected .*, found no file"):
        read_manifest(folder)
