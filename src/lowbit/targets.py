"""Targets: what an engine's integer kernels can do, as one table an engine.

A target chooses formats and places; numeric code never asks which target it serves. Each `Role` below is a way in which
an operator takes part in an integer network; an operator that a target does not list stays in float.

What onnxruntime does was read off its optimized graphs (1.22 to 1.31, CPU): a Conv becomes QLinearConv only if its
output is quantized too; a MatMul or Gemm may keep a float output; Sigmoid, Add, Mul and the pools run in integers
between quantized values; ConvTranspose, LSTM, LayerNormalization, ReduceMean and HardSwish have no integer kernel
behind Q/DQ.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from lowbit.errors import InputError
from lowbit.numerics import INT8, UINT8, Format, Int, channel


class Role(Enum):
    """How an operator takes part in an integer network."""

    CONVOLVE = "multiplies integer weights and activations; its output must be quantized too"
    MULTIPLY = "multiplies integer weights and activations; its output may stay float"
    FOLLOW = "runs in integers when what surrounds it does; its output has its own scale"
    MOVE = "moves values without changing them; input and output share one scale"
    ABSORB = "clips; absorbed into the range of the quantizer behind it"
    STORE = "only its weights are stored in few bits; it computes in float"


def _roles(**operators: str) -> Mapping[str, Role]:
    return MappingProxyType({op: Role[role] for role, ops in operators.items() for op in ops.split()})


MOVES = (
    "MaxPool Reshape Flatten Transpose Squeeze Unsqueeze Slice Concat Split Pad Identity DepthToSpace SpaceToDepth "
    "Expand Tile Gather"
)


@dataclass(frozen=True)
class Target:
    """What is stored and computed in which format on one engine.

    weights       channel(0) stands for the output channel, group(n) runs along the axis that is summed over
    activations   one format for all of them; 8-bit biases do not exist: a bias is int32 at scale S_x · S_w
    roles         operator → Role; operators not listed stay in float
    """

    name: str
    weights: Format
    activations: Format
    roles: Mapping[str, Role] = field(repr=False)
    products: bool = False  # also multiply two activations in integers (attention scores)
    silu_products: int = 0  # a Conv in front of a SiLU that adds up fewer for each output is faster in float
    engine: str = "onnxruntime"  # what the file is for, and what the proof reads back


_ONNXRUNTIME = _roles(
    CONVOLVE="Conv",
    MULTIPLY="MatMul Gemm",
    FOLLOW="Add Mul Sigmoid LeakyRelu AveragePool GlobalAveragePool",
    MOVE=MOVES + " Resize",
    ABSORB="Relu Clip",
    STORE="ConvTranspose LSTM GRU RNN Gather",
)
_FUSING = _roles(  # engines whose convolutions fuse what follows them; a residual Add between them reads integers
    CONVOLVE="Conv ConvTranspose",
    MULTIPLY="MatMul Gemm",
    FOLLOW="Add Mul AveragePool GlobalAveragePool",
    MOVE=MOVES + " Resize",
    ABSORB="Relu Clip",
    STORE="LSTM GRU RNN Gather",
)

# onnxruntime 1.31 with VNNI, one thread, ns for each output of yolox_nano's 1×1 convolutions, float less integers:
# 0.02 to 0.15 for 16 and 32 products, 0.3 for 64, 0.65 for 128, 1.5 for 256; depthwise ones are slower in integers
# (−0.2). Their SiLU takes 0.5 in integers (QLinearSigmoid, QLinearMul) and 0.17 in float (QuickGelu).
# Whole networks, ms: yolox_nano 7.0 (all in integers 8.4, float 7.5), EfficientNet-B0 6.4 (6.5, 7.3). Depthwise ones
# alone in float are slower than all or none (EfficientNet-B0 8.0, in a run where all took 6.3): every layer converts.
_SILU_PRODUCTS = 128

_CHANNELS = INT8.with_block(channel(0))

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target("onnxruntime", _CHANNELS, UINT8, _ONNXRUNTIME, silu_products=_SILU_PRODUCTS),
            # Without VNNI two u8·s8 products are added in 16 bits and can saturate; 7-bit weights cannot.
            Target("onnxruntime-avx2", Format(Int(7), channel(0)), UINT8, _ONNXRUNTIME, silu_products=_SILU_PRODUCTS),
            Target("openvino", _CHANNELS, UINT8, _FUSING, engine="openvino"),
            Target("tensorrt", _CHANNELS, INT8, _FUSING, engine="tensorrt"),
            Target("generic", _CHANNELS, UINT8, _ONNXRUNTIME),
        )
    }
)


def find_target(name: str) -> Target:
    """The target of that name; InputError lists them."""
    if name not in tuple(TARGETS):
        raise InputError(f"target '{name}' does not exist. Targets are: {', '.join(TARGETS)}.")
    return TARGETS[name]
