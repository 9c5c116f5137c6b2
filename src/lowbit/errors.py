"""Every error that lowbit raises on purpose.

LowbitError
├── InputError          a file, array or argument from outside is not usable as it is (also a ValueError)
│   ├── ShapeError      its shape does not fit
│   ├── DataError       calibration or evaluation data: empty, NaN, wrong names, wrong types
│   └── TooSmallError   no file is as small as was asked for
├── ModelError          an ONNX file or a torch module cannot be read, exported or run
├── UnsupportedError    asked for something that this operator, format or engine cannot do
├── DivergedError       training came to numbers that are not finite
├── UnusedRuleError     a rule of a recipe matched nothing
└── MismatchError       the deployed file does not compute what was simulated
"""

import difflib
from collections.abc import Iterable


class LowbitError(Exception):
    """Base of all errors raised on purpose; the command line prints them in one line."""


class InputError(LowbitError, ValueError):
    """Something given from outside cannot be used as it is."""


class ShapeError(InputError):
    """A shape does not fit."""


class DataError(InputError):
    """Calibration or evaluation data cannot be used."""


class TooSmallError(InputError):
    """No file is as small as was asked for."""


class ModelError(LowbitError):
    """A model cannot be read, exported or run."""


class UnsupportedError(LowbitError):
    """An operator, a format or an engine cannot do what was asked."""


class DivergedError(LowbitError):
    """Training came to a loss that is not finite, or out of all proportion."""


class UnusedRuleError(LowbitError):
    """A rule of a recipe matched nothing."""


class MismatchError(LowbitError):
    """The deployed file computes something else than the simulation."""


def check_name(what: str, name: object, names: Iterable[str]) -> None:
    """InputError where a name is none of these; `what` it should name."""
    known = list(names)
    if name not in known:
        raise InputError(f"{what} {name!r} does not exist. {did_you_mean(str(name), known)}")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The sentence after "there is no 'name'": the nearest of the names, or the first twelve."""
    known = list(names)
    if near := difflib.get_close_matches(name, known, 1):
        return f"Did you mean '{near[0]}'?"
    return f"There are {', '.join(known[:12]) or 'none'}{' …' * (len(known) > 12)}."
