"""What the command line does to its own process: it keeps freed memory, imports without pauses, ends at once."""

import subprocess
import sys

import pytest


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_leaving_writes_what_was_printed_and_gives_the_status():
    ended = run("from lowbit.cli.process import leave\nprint('said', end='')\nleave(3)")
    assert (ended.stdout, ended.returncode) == ("said", 3)


def test_leaving_takes_nothing_down():
    ended = run("import atexit\nfrom lowbit.cli.process import leave\natexit.register(print, 'late')\nleave(0)")
    assert ended.stdout == ""


def test_the_command_ends_with_the_status_of_what_it_ran():
    ended = run("import sys\nfrom lowbit.cli import run_process\nsys.argv = ['lowbit', 'show', 'none']\nrun_process()")
    assert ended.returncode == 1
    assert ended.stderr.startswith("lowbit: ")


def test_garbage_is_collected_rarely_but_collected():
    code = "import gc\nfrom lowbit.cli.process import collect_garbage_rarely\ncollect_garbage_rarely()\n"
    assert run(code + "print(gc.isenabled(), gc.get_threshold()[0])").stdout == "True 100000\n"


@pytest.mark.skipif(sys.platform != "linux", reason="page faults of glibc's malloc")
def test_freed_memory_is_handed_out_again():
    code = (
        "import resource, sys\nimport numpy as np\nfrom lowbit.cli.process import keep_freed_memory\n"
        "if sys.argv[1:]: keep_freed_memory()\n"
        "for _ in range(20): np.empty(50_000_000, np.uint8)[::4096] = 1\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )
    faults = [
        int(subprocess.run([sys.executable, "-c", code, *words], capture_output=True, timeout=60, check=True).stdout)
        for words in ([], ["keep"])
    ]
    assert faults[1] < faults[0] / 2  # measured: 24,092 without, 5,204 with
