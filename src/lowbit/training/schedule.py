"""How a network is trained, as a value: it can be compared, printed, pasted back and written as TOML or in one line."""

import math
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w
import torch

from lowbit.errors import InputError, check_name, did_you_mean
from lowbit.training.augment import AUGMENTS
from lowbit.training.optimizer import OPTIMIZERS

COMPRESSING = ("prune_epochs", "code_epochs", "value_epochs")
RATES = {"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3}


@dataclass(frozen=True)
class Schedule:
    """How a network is trained.

    epochs        passes over the data
    batch         samples of a step, over all processes
    optimizer     "sgd" with Nesterov momentum, "adamw" or "adam"
    rate          highest learning rate: it rises over `warm_up` epochs and falls to 0 as a cosine. None: by optimizer
    range_rate    learning rate of ranges (LSQ steps, PACT clips), in parts of `rate`
    weight_decay  of weights; ranges, norms and biases have none
    clip          greatest norm of all gradients together; 0: any
    average       decay of the moving average of weights, which is deployed; 0: the last weights are
    distill       share of the loss that is agreement with the float network; without labels it is all
    temperature   of that agreement
    features      globs over values inside the network that should agree too, as 'relu_*'
    damping       oscillation damping, as a weight of the loss; it rises from 0 to this as a cosine (0: none)
    augment       "crop-flip" for images; "" for none
    recipes       progressive bits: recipes that are trained through before the wanted one, each for as many epochs
    channels_last images lie in memory pixel by pixel; on two cores of a CPU with AVX-512 it gained nothing
    bfloat16      products are computed in bfloat16; None: where the CPU has instructions for it (ResNet-20's float step
                  took 70 ms, 126 in float32)
    seed          of the samples' order and of augmentation
    prune_epochs, code_epochs, value_epochs   of `compress`: while sparsity rises and masks change; while weights train,
                  rounded to their codes, and may change these; while codes stay and the values that they mean train.
                  None: 2 and 3, or 0 where there is a ratio
    """

    epochs: float = 10
    batch: int = 128
    optimizer: str = "sgd"
    rate: float | None = None
    range_rate: float = 1.0
    weight_decay: float = 1e-4
    warm_up: float = 0.0
    clip: float = 0.0
    average: float = 0.0
    distill: float = 0.5
    temperature: float = 2.0
    features: tuple[str, ...] = ()
    damping: float = 0.0
    augment: str = ""
    recipes: tuple[str, ...] = ()
    channels_last: bool = False
    bfloat16: bool | None = None
    seed: int = 0
    prune_epochs: float = 8
    code_epochs: float | None = None
    value_epochs: float | None = None

    def __post_init__(self) -> None:
        for name in ("features", "recipes"):
            held = getattr(self, name)
            object.__setattr__(self, name, (held,) if isinstance(held, str) else tuple(held))
        for name, known in (("optimizer", OPTIMIZERS), ("augment", {"": None, **AUGMENTS})):
            check_name(name, getattr(self, name), known)
        if not self.epochs > 0 or self.batch < 1 or not self.highest > 0:
            raise InputError(f"epochs={self.epochs:g}, batch={self.batch}, rate={self.highest:g}: all are above 0.")
        for name in ("range_rate", "weight_decay", "warm_up", "clip", "damping", *COMPRESSING):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{name}={getattr(self, name):g}: it is 0 or more.")
        if not 0 <= self.distill <= 1 or not 0 <= self.average < 1 or not self.temperature > 0:
            raise InputError(
                f"distill={self.distill:g} is 0 … 1, average={self.average:g} below 1, "
                f"temperature={self.temperature:g} above 0."
            )

    @property
    def highest(self) -> float:
        """The learning rate at its highest."""
        return RATES[self.optimizer] if self.rate is None else self.rate

    def rate_at(self, step: int, total: int, steps_an_epoch: int) -> float:
        """The learning rate of a step: a line up, then half a cosine down to 0."""
        rising = min(math.ceil(self.warm_up * steps_an_epoch), total - 1)
        if step < rising:
            return self.highest * (step + 1) / (rising + 1)
        return self.highest * cosine(step - rising, total - rising)

    @property
    def in_bfloat16(self) -> bool:
        """Whether products are computed in bfloat16."""
        return bfloat16_is_fast() if self.bfloat16 is None else self.bfloat16

    def to_toml(self) -> str:
        """What `of` reads; fields that are as they are by default are left out."""
        return tomli_w.dumps({key: value for key, value in asdict(self).items() if value != getattr(Schedule, key)})

    @staticmethod
    def of(given: "str | Path | Mapping[str, Any] | Schedule | None", default: "Schedule | None" = None) -> "Schedule":
        """From 'rate=0.02 optimizer=adamw', a TOML file of its fields, a table, or as it is.

        default   what fields are that are not given
        """
        default = default or Schedule()
        if given is None or isinstance(given, Schedule):
            return given or default
        if isinstance(given, Mapping):
            return _checked(dict(given), "schedule", default)
        if Path(given).suffix == ".toml":
            try:
                return _checked(tomllib.loads(Path(given).read_text(encoding="utf-8")), f"'{given}'", default)
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
                raise InputError(f"schedule '{given}' cannot be read: {error}.") from None
        words = shlex.split(str(given).replace(";", " "))
        if unclear := next((word for word in words if "=" not in word), None):
            raise InputError(f"schedule: '{unclear}' is not name=value. Example: 'rate=0.02 optimizer=adamw'.")
        table = {name: _value(text) for name, text in (word.split("=", 1) for word in words)}
        return _checked(table, "schedule", default)


def cosine(step: int, total: int) -> float:
    """1 at the first step, nearly 0 at the last of `total`."""
    return 0.5 * (1 + math.cos(math.pi * step / max(1, total)))


@cache
def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 numbers, or the GPU does."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


_KINDS: Mapping[str, tuple[type, ...]] = {
    f.name: (str,) if f.name in ("optimizer", "augment")
    else (str, list, tuple) if f.name in ("features", "recipes")
    else (bool,) if f.name in ("channels_last", "bfloat16")
    else (int,) if f.name in ("batch", "seed")
    else (int, float)
    for f in fields(Schedule)
}  # fmt: skip


def _checked(table: dict[str, Any], where: str, default: Schedule) -> Schedule:
    for name, value in table.items():
        if name not in _KINDS:
            raise InputError(f"{where}: there is no '{name}'. {did_you_mean(name, _KINDS)}")
        if not isinstance(value, _KINDS[name]) or (isinstance(value, bool) and bool not in _KINDS[name]):
            raise InputError(f"{where}: {name}={value!r} is not {' or '.join(kind.__name__ for kind in _KINDS[name])}.")
    return replace(default, **table)


def _value(text: str) -> Any:
    """A word of a line as TOML would have it: a number, true, false, or text; commas make a list."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text.split(",") if "," in text else text
