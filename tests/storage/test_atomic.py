"""A file is the old one or the new one, whatever happens in between."""

import os
import resource
import subprocess
import sys

import pytest

from lowbit.errors import InputError
from lowbit.storage.atomic import refuse_overwriting_input, replacing, write_bytes


def test_the_new_file_appears_whole_and_alone(tmp_path):
    path = tmp_path / "net.onnx"
    assert write_bytes(path, b"new") == 3
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["net.onnx"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_interruption_leaves_the_old_file_and_no_litter(tmp_path, error):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")

    def interrupted():
        with replacing(path) as aside:
            aside.write_bytes(b"half of the n")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["net.onnx"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(InputError, match="disk is full or a size limit reached; nothing was changed"):
            write_bytes(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["net.onnx"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    script = f"""
import os, signal
from lowbit.storage.atomic import replacing
with replacing({str(path)!r}) as aside:
    aside.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == -9
    assert path.read_bytes() == b"old"


def test_permissions_stay_and_a_link_is_followed(tmp_path):
    path, link = tmp_path / "net.onnx", tmp_path / "latest.onnx"
    path.write_bytes(b"old")
    path.chmod(0o600)
    link.symlink_to(path)
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600


def test_places_that_cannot_be_written_are_named(tmp_path):
    with pytest.raises(InputError, match="is a folder; give a file name"):
        write_bytes(tmp_path, b"")
    with pytest.raises(InputError, match=r"the folder '.*absent' does not exist"):
        write_bytes(tmp_path / "absent" / "net.onnx", b"")
    with pytest.raises(InputError, match="not a regular file"):
        write_bytes("/dev/null", b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"net\.onnx.*Permission denied; nothing was changed"):
        write_bytes(tmp_path / "net.onnx", b"new")


def test_the_output_may_not_be_the_input_by_any_name(tmp_path):
    path, link = tmp_path / "net.onnx", tmp_path / "link.onnx"
    path.write_bytes(b"old")
    link.symlink_to(path)
    refuse_overwriting_input(tmp_path / "other.onnx", path)
    for output in (path, link, tmp_path / "." / "net.onnx"):
        with pytest.raises(InputError, match="the original would be lost"):
            refuse_overwriting_input(output, path)
