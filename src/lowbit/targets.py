"""Targets: which integer kernels an engine has, as one table an engine.

A target chooses formats and places; numeric code never asks which target it serves. An operator without an integer
kernel only moves values (`Operator.shares` in `network/operators.py`), only stores its weights in few bits, or stays in
float.

What onnxruntime does was read off its optimized graphs (1.22 to 1.31, CPU): a Conv becomes QLinearConv only if its
output is quantized too; a MatMul or Gemm may keep a float output; Sigmoid, Add, Mul and the pools run in integers
between quantized values; ConvTranspose, LSTM, LayerNormalization, ReduceMean and HardSwish have no integer kernel
behind Q/DQ.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from lowbit.errors import check_name
from lowbit.numerics import INT8, UINT8, Format, Int, channel, fixed_point


class Role(Enum):
    """How a node takes part in an integer network. The first four are kernels that a target lists."""

    CONVOLVE = "multiplies integer weights and activations; its output must be quantized too"
    MULTIPLY = "multiplies integer weights and activations; its output may stay float"
    FOLLOW = "runs in integers when what surrounds it does; its output has its own scale"
    ABSORB = "clips; absorbed into the range of the quantizer behind it"
    MOVE = "moves values without changing them; input and output share one scale"
    STORE = "only its weights are stored in few bits; it computes in float"


COMPUTING = (Role.CONVOLVE, Role.MULTIPLY, Role.FOLLOW)  # with arithmetic of their own


def _kernels(**operators: str) -> Mapping[str, Role]:
    return MappingProxyType({op: Role[role] for role, ops in operators.items() for op in ops.split()})


@dataclass(frozen=True)
class Target:
    """What is stored and computed in which format on one engine.

    weights       channel(0) stands for the output channel, group(n) runs along the axis that is summed over
    activations   one format for all of them; 8-bit biases do not exist: a bias is int32 at scale S_x · S_w
    kernels       operator → how its integer kernel works
    dynamic       operators with an integer kernel that measures the range of each input → of recurrent layers, the
                  states from which it is faster than float; no other operator has one
    adds          operators whose integer kernel adds a value of the same shape before it rounds
    in_float      functions of several operators that are faster in float, between two integer kernels
    engine        what the file is for, and what the proof reads back
    whole         everything between inputs and outputs is in integers; what has no integer form is an error
    states        recurrent operator → state → what it is stored in from step to step; empty: float
    """

    name: str
    weights: Format
    activations: Format
    kernels: Mapping[str, Role] = field(repr=False)
    in_float: frozenset[str] = frozenset()
    dynamic: Mapping[str, int] = field(default_factory=dict)
    adds: frozenset[str] = frozenset()
    engine: str = "onnxruntime"
    whole: bool = False
    states: Mapping[str, Mapping[str, Format]] = field(default_factory=dict)


_ONNXRUNTIME = _kernels(
    CONVOLVE="Conv",
    MULTIPLY="MatMul Gemm",
    FOLLOW="Add Mul Sigmoid LeakyRelu AveragePool GlobalAveragePool",
    ABSORB="Relu Clip",
)
_FUSING = _kernels(  # engines whose convolutions fuse what follows them; a residual Add between them reads integers
    CONVOLVE="Conv ConvTranspose",
    MULTIPLY="MatMul Gemm",
    FOLLOW="Add Mul AveragePool GlobalAveragePool",
    ABSORB="Relu Clip",
)
_WHOLE = _kernels(  # operators with a form in lowbit.integer; those of one value are tables of 256
    CONVOLVE="Conv ConvTranspose MatMul Gemm LSTM GRU RNN",
    FOLLOW="Add Sub Mul AveragePool GlobalAveragePool ReduceMean Sigmoid Tanh LeakyRelu Elu HardSigmoid HardSwish Gelu "
    "Softmax LayerNormalization",
    ABSORB="Relu Clip",
)

# onnxruntime 1.31 with VNNI, one thread, ns a value: x · sigmoid(x) takes 0.45 in integers (QLinearSigmoid 0.25,
# a table; QLinearMul 0.20) and 0.31 in float (DequantizeLinear 0.10, QuickGelu 0.14, QuantizeLinear 0.07).
# yolox_nano, all convolutions in integers, ms: 8.45 and 7.33; float 7.87.
_SILU = frozenset({"SiLU"})

# ConvInteger takes 5 to 7 times as long as a float Conv (16 to 256 channels, 8 to 56 pixels, one thread): none here.
# A GRU or an RNN is a Scan of MatMulInteger, whose steps cost a GRU 4 µs beside its products. ms for 100 steps of
# batch 1, float and integers: GRU of 256 states 0.89 and 0.89, of 320 1.38 and 1.03; RNN of 128 0.21 and 0.23, of 256
# 0.58 and 0.32 (`python -m benchmarks.recurrent --cells`).
_SCANS = {"GRU": 320, "RNN": 192}
_DYNAMIC = MappingProxyType({"MatMul": 1, "Gemm": 1, "LSTM": 1} | _SCANS)

_H = MappingProxyType({"h": fixed_point(16, -15)})  # |h| ≤ 1: a tanh, or a mean of such
_STATES = MappingProxyType({"LSTM": {**_H, "c": fixed_point(16, -11)}, "GRU": _H, "RNN": _H})  # |c| ≤ 16

_CHANNELS = INT8.with_block(channel(0))

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target("onnxruntime", _CHANNELS, UINT8, _ONNXRUNTIME, _SILU, _DYNAMIC),
            # Without VNNI two u8·s8 products are added in 16 bits and can saturate; 7-bit weights cannot.
            Target("onnxruntime-avx2", Format(Int(7), channel(0)), UINT8, _ONNXRUNTIME, _SILU, _DYNAMIC),
            Target("openvino", _CHANNELS, UINT8, _FUSING, adds=frozenset({"Conv"}), engine="openvino"),
            Target("tensorrt", _CHANNELS, INT8, _FUSING, engine="tensorrt"),
            # Standard operators: MatMulInteger and ConvInteger.
            Target(
                "generic",
                _CHANNELS,
                UINT8,
                _ONNXRUNTIME,
                dynamic=MappingProxyType({"MatMul": 1, "Gemm": 1, "Conv": 1} | _SCANS),
            ),
            # Codes of weights from −127 to 127, as TFLite's specification asks for.
            Target("integer", Format(Int(8, narrow=True), channel(0)), UINT8, _WHOLE, whole=True, states=_STATES),
        )
    }
)


def find_target(name: str) -> Target:
    """The target of that name; InputError lists them."""
    check_name("target", name, TARGETS)
    return TARGETS[name]
