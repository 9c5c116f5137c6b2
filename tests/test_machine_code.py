"""Kernels compile wherever lowbit is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit


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
