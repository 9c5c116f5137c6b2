"""`python -m lowbit` is the command `lowbit`."""

from lowbit.cli import run_process

run_process()
