"""What compression is asked for: a value that can be compared, printed and pasted back."""

import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import tomli_w

from lowbit.errors import InputError
from lowbit.recipe import FLOAT, TensorSpec
from lowbit.solve.kmeans import codebook_format
from lowbit.solve.prune import Pruning

Progress = Callable[[str, int, int], None]
"""Called with (phase, steps done, steps of the phase)."""


@dataclass(frozen=True)
class Layer:
    """What becomes of one weight: the share of it that becomes zero, and the bits of a code."""

    name: str
    sparsity: float
    codebook: int


@dataclass(frozen=True)
class Compression:
    """What becomes of the weights, and how long is trained for it.

    ratio            float32 bytes of the parameters over bytes of the packed file: weights are then multiples of a
                     step, as fine as that allows (lowbit.flows.fit_size). 0: a codebook for each weight
    prune            share of weights that become zero, or a Pruning; 0: none. None: 0.9, or 0 where there is a ratio
    codebook         bits of a code, 1 … 8; 0: weights are pruned but stay float32. None: 4
    tables           tables of a codebook: parts of the weight's first axis that have their own
    start            of k-means, see KMeans
    multiplier       Lagrange multiplier of a bit in k-means, see lowbit.solve.kmeans
    prune_epochs     while sparsity rises and masks change
    code_epochs      while weights train on, rounded to the values of their codes, and may still change their codes.
                     None: 2, or 0 where there is a ratio: it is near its best without, and few samples do harm
    value_epochs     while codes stay and the values that they mean train. None: 3, or 0 where there is a ratio
    learning_rate    a step, relative to a tensor's root mean square. None: 0.02, or 0.002 where there is a ratio:
                     weights rounded with feedback are already near their best
    distill          share of the loss that is agreement with the float network, where there are labels; without: 1
    mantissa_bits    of the biases and tables that stay float32
    layers           choices for single weights, which override prune and codebook
    """

    ratio: float = 0.0
    prune: float | Pruning | None = None
    codebook: int | None = None
    tables: int = 1
    start: str = "linear"
    multiplier: float = 0.0
    prune_epochs: float = 8
    code_epochs: float | None = None
    value_epochs: float | None = None
    batch: int = 64
    learning_rate: float | None = None
    distill: float = 0.5
    temperature: float = 2.0
    mantissa_bits: int = 7
    seed: int = 0
    layers: tuple["Layer", ...] = ()

    def __post_init__(self) -> None:
        if self.codebook is not None and not 0 <= self.codebook <= 8:
            raise InputError(f"a codebook has 1 to 8 bits, or 0 for none; not {self.codebook}.")
        if self.ratio and (self.codebook is not None or self.layers or self.tables > 1):
            raise InputError("a ratio decides how many values each weight has: leave out codebook, tables and layers.")
        if self.ratio and not self.ratio > 1:
            raise InputError(f"a ratio is how many times smaller the file should be, above 1; not {self.ratio:g}.")
        if min(self.epochs.values()) < 0 or self.batch < 1 or self.rate_of_learning <= 0:
            raise InputError(f"{self!r}: epochs are 0 or more, batch and learning rate above 0.")
        if not 0 <= self.distill <= 1 or not 1 <= self.mantissa_bits <= 23:
            raise InputError(f"{self!r}: distill is 0 … 1, mantissa_bits 1 … 23.")

    @property
    def pruning(self) -> Pruning:
        """What is pruned, with the default filled in."""
        if isinstance(self.prune, Pruning):
            return self.prune
        return Pruning((0.0 if self.ratio else 0.9) if self.prune is None else self.prune)

    @property
    def bits(self) -> int:
        """Of a shared weight's code; 0 where weights are not shared, or a ratio decides."""
        return (0 if self.ratio else 4) if self.codebook is None else self.codebook

    @property
    def epochs(self) -> dict[str, float]:
        """Phase → passes over the data, with the defaults filled in; `prune` where anything is pruned."""
        codes, values = (0, 0) if self.ratio else (2, 3)
        return {
            "prune": self.prune_epochs,
            "codes": codes if self.code_epochs is None else self.code_epochs,
            "values": values if self.value_epochs is None else self.value_epochs,
        }

    @property
    def trains(self) -> bool:
        """Whether any phase passes over the data."""
        epochs = self.epochs
        prunes = self.pruning.sparsity > 0 and epochs["prune"] > 0
        return prunes or (self.shares and epochs["codes"] + epochs["values"] > 0)

    @property
    def rate_of_learning(self) -> float:
        """The learning rate, with the default filled in."""
        return (0.002 if self.ratio else 0.02) if self.learning_rate is None else self.learning_rate

    def spec(self, name: str, shape: tuple[int, ...]) -> TensorSpec:
        """What a weight is stored in; None where it stays float."""
        if self.ratio:
            return TensorSpec("uint8", solve="gptq")
        bits = next((layer.codebook for layer in self.layers if layer.name == name), self.bits)
        if not bits:
            return FLOAT
        tables = self.tables if shape[0] % self.tables == 0 else 1
        return TensorSpec(codebook_format(bits, self.start, tables, shape), solve="kmeans")

    @property
    def shares(self) -> bool:
        """Whether weights become codes."""
        return bool(self.ratio or self.bits or self.layers)

    def to_toml(self) -> str:
        """What differs from the defaults."""
        default, asked = asdict(Compression()), asdict(self)
        return tomli_w.dumps({name: value for name, value in asked.items() if value != default[name]})

    @staticmethod
    def from_toml(text: str, source: str = "recipe") -> "Compression":
        """Read what `to_toml` wrote, or what a person did; InputError says which key is wrong."""
        try:
            table = tomllib.loads(text)
            if isinstance(table.get("prune"), dict):
                table["prune"] = Pruning(**table["prune"])
            return Compression(**table | {"layers": tuple(Layer(**row) for row in table.get("layers", ()))})
        except (tomllib.TOMLDecodeError, TypeError) as error:
            names = ", ".join(field.name for field in fields(Compression))
            raise InputError(f"{source} is no recipe of a compression: {error}. Keys are: {names}.") from None
