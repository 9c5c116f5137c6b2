"""Files that are either the old one or the new one, never half of one: written aside, then renamed.

A full disk, Ctrl-C or a crash while writing leaves the old file as it was and no litter beside it.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowbit.errors import InputError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to; on leaving without an error it becomes `path`, else it is removed.

    InputError where the folder is missing or read-only, the path is a folder, or the disk is full.
    """
    target = Path(path)
    _check_target(target)
    # Through a symbolic link the file it points to is replaced, not the link.
    target = target.resolve()
    aside = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        yield aside
        _sync(aside)
        if target.exists():
            os.chmod(aside, target.stat().st_mode & 0o7777)
        os.replace(aside, target)
    except OSError as error:
        raise _explained(error, target) from error
    finally:
        aside.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> int:
    """Write `data` to `path` atomically; returns the number of bytes."""
    with replacing(path) as aside:
        aside.write_bytes(data)
    return len(data)


def refuse_overwriting_input(output: str | os.PathLike[str], *inputs: str | os.PathLike[str]) -> None:
    """InputError where `output` is one of the files that are read, by any name (links included)."""
    target = Path(output)
    for source in map(Path, inputs):
        if target.exists() and source.exists() and target.samefile(source):
            raise InputError(f"'{output}' is the input '{source}'; the original would be lost. Choose another output.")


def _check_target(target: Path) -> None:
    if target.is_dir():
        raise InputError(f"'{target}' is a folder; give a file name.")
    if not target.parent.is_dir():
        raise InputError(f"'{target}' cannot be written: the folder '{target.parent}' does not exist.")
    if target.exists() and not target.is_file():
        raise InputError(f"'{target}' is not a regular file.")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _explained(error: OSError, target: Path) -> InputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InputError(f"'{target}' was not written: the disk is full or a size limit reached; nothing was changed.")
    return InputError(f"'{target}' was not written: {error.strerror or error}; nothing was changed.")
