"""Convolutions in the C as calls of CMSIS-NN, ARM's kernels for Cortex-M, with the same results.

CMSIS-NN rounds twice; compiled with CMSIS_NN_USE_SINGLE_ROUNDING it rounds once, half up, as the program does. The C
refuses to compile where the library's rounding is not the program's. Source: arm_nnfunctions.h, CMSIS-NN 4 to 8.
"""

from collections.abc import Iterator
from typing import TypeGuard

import numpy as np

from lowbit.integer.c_writer import Writer, ends_of
from lowbit.integer.plan import scratch_name
from lowbit.integer.program import Conv, Layer, Rounding
from lowbit.integer.reference import spatial


def suits(layer: Layer) -> TypeGuard[Conv]:
    """Whether CMSIS-NN has the layer: 8 bits, no depth, no groups but depthwise, one number a byte."""
    if not isinstance(layer, Conv) or layer.packed or max(layer.input.bits, layer.output.bits) > 8:
        return False
    flat = layer.weight.shape[1] == 1 and spatial(layer.input)[0] == 1 == spatial(layer.output)[0]
    return flat and (layer.groups == 1 or layer.depthwise)


def buffer_bytes(layer: Conv) -> int:
    """What CMSIS-NN asks for at most on any Cortex-M; of a depthwise layer what it asks for with DSP instructions."""
    products = int(np.prod(layer.weight.shape[1:]))
    return 2 * layer.weight.size if layer.depthwise else 4 * (-(-products // 16) * 16)


def include(rounding: Rounding) -> Iterator[str]:
    yield '#include "arm_nnfunctions.h"'
    wrong, what = ("ifndef", "compile CMSIS-NN with") if rounding == "once" else ("ifdef", "compile CMSIS-NN without")
    yield f"#{wrong} CMSIS_NN_USE_SINGLE_ROUNDING"
    yield f'#error "This network was exported with --rounding {rounding}: {what} CMSIS_NN_USE_SINGLE_ROUNDING."'
    yield "#endif"


def step(writer: Writer, layer: Conv) -> Iterator[str]:
    rows = layer.weight.reshape(len(layer.weight), -1)
    weight = np.ascontiguousarray(rows.T) if layer.depthwise else rows  # depthwise: the channels last
    (_, h, w, c), (_, out_h, out_w, out_c) = spatial(layer.input), spatial(layer.output)
    bias = layer.bias + layer.input.zero * rows.astype(np.int64).sum(1)  # the library takes the zero off by itself
    shift = layer.rescale.left - layer.rescale.shift
    tables = {
        key: writer.table(kind, f"{layer.name}_{key}", array)
        for key, kind, array in (
            ("weight", "int8_t", weight),
            ("bias", "int32_t", bias),
            ("multiplier", "int32_t", layer.rescale.multiplier),
            ("shift", "int32_t", shift),
        )
    }
    taps = {"n": 1 if layer.depthwise else out_c, "h": layer.weight.shape[2], "w": layer.weight.shape[3]}
    fields = {
        **tables,
        "buffer": buffer_bytes(layer),
        "in": {"n": 1, "h": h, "w": w, "c": c},
        "taps": {**taps, "c": out_c if layer.depthwise else c},
        "out": {"n": 1, "h": out_h, "w": out_w, "c": out_c},
        "in_zero": layer.input.zero,
        **ends_of(layer),
    }
    for key, pair in (("stride", layer.strides), ("pad", layer.pads), ("dilation", layer.dilations)):
        fields[key] = {"w": pair[2], "h": pair[1]}
    name = writer.function("cmsis_depthwise" if layer.depthwise else "cmsis_convolve")
    places = f"{writer.place(layer.input)}, {writer.place(layer.output)}, {writer.at(scratch_name(layer.name))}"
    yield f"    if ({name}({writer.struct('cmsis', layer.name, fields)}, {places}))\n        return 3;"
