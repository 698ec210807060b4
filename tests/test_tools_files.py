"""tools/files.py and tools/command.py: files and output are written whole or not at all."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import files

TOOLS = Path(__file__).parent.parent / "tools"


def test_the_new_content_replaces_the_old(tmp_path):
    path = tmp_path / "a.json"
    for content in (b"first", b"second, longer", b""):
        files.write(path, content)
        assert path.read_bytes() == content and [*tmp_path.iterdir()] == [path]


def test_both_the_file_and_its_folder_are_on_the_disk_around_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (calls.append("rename"), rename(path, to))[1])
    files.write(tmp_path / "a.pt", b"content")
    assert calls == [str(tmp_path / "a.pt.partial"), "rename", str(tmp_path)]


def test_a_link_goes_on_pointing_at_its_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    files.write(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"content"


def test_what_is_no_file_is_not_replaced():
    files.write(Path("/dev/null"), b"content")
    with pytest.raises(files.FileError, match=r"^/dev/full cannot be written: No space left on device$"):
        files.write(Path("/dev/full"), b"content")
    assert Path("/dev/null").is_char_device() and Path("/dev/full").is_char_device()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, error):
    def interrupted(_):
        raise error

    path = tmp_path / "a.pt"
    files.write(path, b"old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(error):
        files.write(path, b"new")
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_and_a_read_only_file_are_known_before(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(0o400)
    with pytest.raises(files.FileError, match="a cannot be written: it is read-only; make it writable, or name"):
        files.refuse_unwritable(tmp_path / "a")
    tmp_path.chmod(0o500)
    with pytest.raises(files.FileError, match="b cannot be written: Permission denied; name another folder"):
        files.refuse_unwritable(tmp_path / "b")


@pytest.mark.parametrize(
    ("redirection", "complaint"),
    [("> /dev/full", "-c: error: standard output cannot be written: No space left on device\n"), ("| true", "")],
)
def test_a_full_disk_or_no_reader_behind_standard_output(redirection, complaint):
    program = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import command; command.show('a table')"
    line = f"(sleep 0.1; {shlex.join([sys.executable, '-c', program])}; echo $? >&2) {redirection}"
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True).stderr == f"{complaint}2\n"
