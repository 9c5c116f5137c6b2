"""Runs a Python script in several processes under torchrun, as a user would; none can outlive its test."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lowbit as lb


def torchrun(
    count: int, script: str, folder: Path, *options: str, arguments: tuple[str, ...] = (), timeout: float = 120
) -> str:
    """What the processes printed; AssertionError with it where one failed."""
    (folder / "script.py").write_text(script)
    tests = Path(__file__).parent
    paths = os.pathsep.join(map(str, (Path(lb.__file__).parents[1], tests, tests / "flows")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *options]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "script.py", *arguments], cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        told, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, told
    return told
