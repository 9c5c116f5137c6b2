"""Functions of one value, in float64: what a table of 256 codes is filled with. ONNX's operators of these names."""

from collections.abc import Callable, Mapping
from math import erf
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Reals = NDArray[np.float64]
_erf = np.vectorize(erf, otypes=[np.float64])


def _sigmoid(x: Reals) -> Reals:
    return np.asarray(1 / (1 + np.exp(-x)))


def _softplus(x: Reals) -> Reals:
    return np.logaddexp(0, x)


def _gelu(x: Reals, approximate: str = "none") -> Reals:
    if approximate == "tanh":
        return np.asarray(x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
    return np.asarray(x / 2 * (1 + _erf(x / np.sqrt(2))))


def _hard_sigmoid(x: Reals, alpha: float = 0.2, beta: float = 0.5) -> Reals:
    return np.clip(alpha * x + beta, 0, 1)


def _elu(x: Reals, alpha: float = 1.0) -> Reals:
    return np.where(x < 0, alpha * np.expm1(x), x)


def _leaky_relu(x: Reals, alpha: float = 0.01) -> Reals:
    return np.where(x < 0, alpha * x, x)


def _clip(x: Reals, low: Any = None, high: Any = None) -> Reals:
    return np.clip(x, -np.inf if low is None else low, np.inf if high is None else high)


FUNCTIONS: Mapping[str, Callable[..., Reals]] = MappingProxyType(
    {
        "Relu": lambda x: np.maximum(x, 0),
        "Clip": _clip,
        "LeakyRelu": _leaky_relu,
        "PRelu": lambda x, slope: np.where(x < 0, slope * x, x),
        "Elu": _elu,
        "Sigmoid": _sigmoid,
        "HardSigmoid": _hard_sigmoid,
        "HardSwish": lambda x: x * _hard_sigmoid(x, 1 / 6, 0.5),
        "Swish": lambda x, alpha=1.0: x * _sigmoid(alpha * x),
        "Mish": lambda x: x * np.tanh(_softplus(x)),
        "Gelu": _gelu,
        "Tanh": np.tanh,
        "Erf": _erf,
        "Softplus": _softplus,
        "Exp": np.exp,
        "Log": np.log,
        "Sqrt": np.sqrt,
        "Abs": np.abs,
        "Neg": np.negative,
        "Reciprocal": np.reciprocal,
        "Identity": lambda x: x,
        "Add": np.add,
        "Sum": np.add,
        "Sub": np.subtract,
        "Mul": np.multiply,
        "Div": np.divide,
        "Pow": np.power,
        "Max": np.maximum,
        "Min": np.minimum,
    }
)
"""Operator → its value at numbers, other operands and attributes as it takes them."""


def evaluate(node: ir.Node, operands: "list[Reals | None]") -> Reals:
    """The node's value at each of 256 numbers; operands are those numbers or constants of one element."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    with np.errstate(all="ignore"):
        result = FUNCTIONS[node.op_type](*operands, **attributes)
    return np.nan_to_num(np.asarray(result, np.float64), nan=0.0, posinf=1e30, neginf=-1e30)
