"""Kernels compile wherever lowbit is installed, by one process at a time, and are told apart by name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from filelock import FileLock, Timeout
from numba.core.dispatcher import Dispatcher

import lowbit
from lowbit.machine_code import kernel
from lowbit.numerics.kernels import loops


@pytest.mark.slow  # compiles all loops anew
def test_a_read_only_install_without_a_home_still_computes(tmp_path):
    """numba raises "no locator available" where neither __pycache__ nor a home folder can be made."""
    installed = tmp_path / "lowbit"
    shutil.copytree(Path(lowbit.__file__).parent, installed, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [installed, *(path for path in installed.rglob("*") if path.is_dir())]:
        (folder / "__pycache__").write_bytes(b"")  # a file: no folder of that name can be made, not even by root
    code = "import lowbit.flows.ptq, lowbit.flows.compress, lowbit.storage.ans as a; print(a.__file__)"
    own = {"PYTHONPATH": str(tmp_path), "HOME": os.devnull, "XDG_CACHE_HOME": os.devnull}
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | own
    command = [sys.executable, "-B", "-c", code]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert told.stdout.startswith(str(installed)), told.stderr


def _is_free(lock: Path) -> bool:
    """Whether another than this thread may take a lock."""
    taken = []

    def take() -> None:
        try:
            with FileLock(lock, timeout=0):
                taken.append(lock)
        except Timeout:
            pass

    other = Thread(target=take)
    other.start()
    other.join()
    return bool(taken)


def test_no_other_process_compiles_meanwhile(monkeypatch):
    """Two at once would give two signatures one file: the wrong code would run, then and in every later process."""
    free: list[bool] = []
    unwatched = Dispatcher.compile

    def watched(self: Any, signature: Any) -> Any:
        if self.stats.cache_path:  # numba has functions of its own to compile
            free.append(_is_free(Path(self.stats.cache_path) / "lowbit.lock"))
        return unwatched(self, signature)

    monkeypatch.setattr(Dispatcher, "compile", watched)

    @kernel
    def twice(x: Any) -> Any:
        return 2 * x

    assert twice(3) == 6
    assert twice(np.arange(3.0)).tolist() == [0, 2, 4]
    assert free == [False, False]
    assert _is_free(Path(twice.stats.cache_path) / "lowbit.lock")


def test_without_the_lock_a_kernel_computes_and_leaves_the_disk_alone(monkeypatch):
    """A process that was stopped while it compiled holds the lock: nobody waits for ever, or writes beside it."""

    @kernel
    def thrice(x: Any) -> Any:
        return 3 * x

    folder = Path(thrice.stats.cache_path)
    for left in folder.glob("*thrice*"):  # by an earlier run
        left.unlink()
    monkeypatch.setattr("lowbit.machine_code._PATIENCE", 0.01)
    held, done = Event(), Event()

    def hold() -> None:
        with FileLock(folder / "lowbit.lock"):
            held.set()
            done.wait(60)

    other = Thread(target=hold)
    other.start()
    held.wait(60)
    try:
        assert thrice(3) == 9
    finally:
        done.set()
        other.join()
    assert not list(folder.glob("*thrice*"))
    assert thrice(1.5) == 4.5  # the lock is free again: this signature is kept
    assert len(list(folder.glob("*thrice*.nbc"))) == 1


def test_a_function_that_another_makes_needs_a_name():
    def make(width: int) -> Any:
        def widen(x: Any) -> Any:
            return width * x

        return widen

    with pytest.raises(ValueError, match="give it a name of its own"):
        kernel(make(2))
    assert [kernel(name=f"widen_{width}")(make(width))(3) for width in (2, 4)] == [6, 12]


def test_kernels_of_one_source_are_kept_apart():
    """Each has files of its own; numba would tell them apart by what they close over, but not when it links."""
    kernels = [loops._repeat_2, loops._repeat_4, loops._repeat_8, loops._repeat_16]
    kernels += [loops.encode_float, loops.encode_wide_float, loops.round_float, loops.round_wide_float]
    assert len({made.py_func.__qualname__ for made in kernels}) == len(kernels)
