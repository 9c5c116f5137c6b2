"""The command `lowbit`: one small module for each subcommand; heavy imports wait until a command runs."""

from lowbit.cli.app import main, run_process

__all__ = ["main", "run_process"]
