"""Processes that work together: torchrun starts them, torch.distributed joins them. Alone, everything here is trivial.

gloo on CPUs, nccl on GPUs. What they tell each other is the same on all of them, so that all take the same decisions.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Told = TypeVar("Told")
_JOINED = itertools.count()  # how often this process has joined the others before
PATIENCE = timedelta(minutes=30)
"""How long one waits for another: calibration and the proof of a file are not equally long everywhere."""


def count() -> int:
    """How many there are."""
    import torch.distributed as group

    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


def number() -> int:
    """Which of them this one is: 0 … count - 1."""
    import torch.distributed as group

    return group.get_rank() if group.is_available() and group.is_initialized() else 0


@contextmanager
def joined() -> Iterator[None]:
    """Inside, processes of torchrun know each other; who has joined already stays joined."""
    import torch
    import torch.distributed as group
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or group.is_initialized():
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # torchrun's store outlives workers that it restarts: without a prefix they would read addresses of the dead (2.13).
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    own = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}, {next(_JOINED)}", store)
    kind = "nccl" if on_gpu else "gloo"
    group.init_process_group(kind, store=own, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield
    finally:
        group.destroy_process_group()


def gathered(mine: Told) -> list[Told]:
    """What each process says, in their order; anything that can be pickled."""
    if count() == 1:
        return [mine]
    import torch.distributed as group

    found: list[Told | None] = [None] * count()
    group.all_gather_object(found, mine)
    return found  # type: ignore[return-value]


def mean(value: "Tensor") -> "Tensor":
    """The mean of what all processes have, without a gradient."""
    if count() == 1:
        return value.detach()
    import torch.distributed as group

    total = value.detach().clone()
    group.all_reduce(total)
    return total / count()


def least(value: "Tensor") -> "Tensor":
    """The least of what all processes have, number by number, without a gradient."""
    if count() > 1:
        import torch.distributed as group

        group.all_reduce(value, group.ReduceOp.MIN)
    return value


def summed(value: "Tensor") -> "Tensor":
    """The sum of what all processes have, on each of them, with a gradient: each loss reaches every summand."""
    import torch
    import torch.distributed as group

    class Summed(torch.autograd.Function):
        @staticmethod
        def forward(context: object, x: "Tensor") -> "Tensor":
            total = x.clone()
            group.all_reduce(total)
            return total

        @staticmethod
        def backward(context: object, *gradients: "Tensor") -> "Tensor":
            total = gradients[0].clone()
            group.all_reduce(total)
            return total

    return value if count() == 1 else Summed.apply(value)  # type: ignore[no-untyped-call]
