"""Checkpoints: the state of a run in one safetensors file, written aside, that belongs to this run and no other."""

import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lowbit import processes
from lowbit.errors import InputError
from lowbit.storage.atomic import write_bytes

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and progress that JSON can hold."""


@dataclass
class Checkpoints:
    """Where the state is kept, and how often.

    path       None: nowhere
    identity   what the run is about: a checkpoint of another run is an InputError, not a wrong result
    """

    path: Path | None
    identity: Mapping[str, Any]
    every_seconds: float = 30.0
    last: float = field(default_factory=time.monotonic)
    taken: tuple[dict[str, Tensor], str] | None = None

    def load(self) -> State | None:
        """Tensors and progress of an earlier run, or None where there was none."""
        if self.path is None or not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                notes = json.loads(file.metadata()["lowbit.checkpoint"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise InputError(f"checkpoint '{self.path}' cannot be read ({error}); delete it to start anew.") from None
        wanted = json.loads(json.dumps(self.identity))
        if differ := _differences(notes["identity"], wanted):
            raise InputError(
                f"checkpoint '{self.path}' belongs to another run, with another {' and '.join(differ)}. Repeat that "
                "command to go on with it, delete it to start anew, or choose another output."
            )
        return tensors, notes["progress"]

    def save(self, state: Callable[[], State], now: bool = False) -> None:
        """Take down the state if it is time. It is written once `confirm` says that it is good; or `now`."""
        if self.path is None or not (now or time.monotonic() - self.last > self.every_seconds):
            return
        self.last = time.monotonic()
        if processes.number() == 0:  # of several the first one writes
            tensors, progress = state()
            copies = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
            self.taken = copies, json.dumps({"identity": self.identity, "progress": progress})
        if now:
            self.confirm()

    def confirm(self) -> None:
        """Write what was taken down. A disk that is full is a warning: training is worth more."""
        if self.taken is None or self.path is None:
            return
        (tensors, notes), self.taken = self.taken, None
        try:
            write_bytes(self.path, save(tensors, {"lowbit.checkpoint": notes}))
        except InputError as error:
            kept = "the one before it stays" if self.path.exists() else "there is none yet"
            warnings.warn(f"no checkpoint could be written, {kept}; training goes on. {error}", stacklevel=2)

    def remove(self) -> None:
        """The run is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs in the words of a user: of tables each field with what the checkpoint has of it."""
    found = []
    for key in sorted({**held, **wanted}):
        one, other = held.get(key), wanted.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            fields = [name for name in {**one, **other} if one.get(name) != other.get(name)]
            found += [f"{key} ({', '.join(f'{name}={one.get(name)}' for name in fields)})"] if fields else []
        elif one != other:
            found.append(key)
    return found
