"""What compression is asked for: a value that can be compared, printed and pasted back."""

from dataclasses import dataclass

from lowbit.errors import InputError
from lowbit.solve.prune import Pruning


@dataclass(frozen=True)
class Layer:
    """What becomes of one weight: the share of it that becomes zero, and the bits of a code."""

    name: str
    sparsity: float
    codebook: int


@dataclass(frozen=True)
class Compression:
    """What becomes of the weights, and how long is trained for it.

    prune            share of weights that become zero, or a Pruning; 0: none
    codebook         bits of a shared weight's code, 1 … 8; 0: weights are pruned but not shared
    tables           tables of shared values for each weight: parts of its first axis that have their own
    start, rate      of weight sharing, see lowbit.solve.share
    prune_epochs     while sparsity rises and settles
    settle_epochs    while weights train on, rounded to shared values, and may still change their codes
    share_epochs     while codes stay and shared values train
    learning_rate    a step, relative to a tensor's root mean square
    distill          share of the loss that is agreement with the float network, where there are labels; without: 1
    mantissa_bits    of the biases and tables that stay float32
    layers           choices for single weights, which override prune and codebook; see lowbit.flows.shrink
    """

    prune: float | Pruning = 0.9
    codebook: int = 4
    tables: int = 1
    start: str = "linear"
    rate: float = 0.0
    prune_epochs: float = 8
    settle_epochs: float = 2
    share_epochs: float = 3
    batch: int = 64
    learning_rate: float = 0.02
    distill: float = 0.5
    temperature: float = 2.0
    mantissa_bits: int = 7
    seed: int = 0
    layers: tuple["Layer", ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.codebook <= 8:
            raise InputError(f"a codebook has 1 to 8 bits, or 0 for none; not {self.codebook}.")
        if (
            min(self.prune_epochs, self.settle_epochs, self.share_epochs) < 0
            or self.batch < 1
            or self.learning_rate <= 0
        ):
            raise InputError(f"{self!r}: epochs are 0 or more, batch and learning rate above 0.")
        if not 0 <= self.distill <= 1 or not 1 <= self.mantissa_bits <= 23:
            raise InputError(f"{self!r}: distill is 0 … 1, mantissa_bits 1 … 23.")

    @property
    def pruning(self) -> Pruning:
        return self.prune if isinstance(self.prune, Pruning) else Pruning(self.prune)
