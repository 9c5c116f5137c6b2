"""Convolutions in the C as calls of CMSIS-NN, ARM's kernels for Cortex-M, with the same results.

CMSIS-NN rounds twice; compiled with CMSIS_NN_USE_SINGLE_ROUNDING it rounds once, half up, as the program does. The C
refuses to compile where the library's rounding is not the program's. Source: arm_nnfunctions.h, CMSIS-NN 4 to 8.
"""

from collections.abc import Iterator
from typing import TypeGuard

import numpy as np

from lowbit.integer.c_writer import Writer, ends_of
from lowbit.integer.plan import scratch_name
from lowbit.integer.program import Conv, Layer
from lowbit.integer.tensors import Rounding


def suits(layer: Layer) -> TypeGuard[Conv]:
    """Whether CMSIS-NN has the layer: 8 bits, no depth, no groups but depthwise, one number a byte."""
    if not isinstance(layer, Conv) or layer.packed or max(layer.input.bits, layer.output.bits) > 8:
        return False
    flat = layer.window.taps[0] == 1 and layer.window.size[0] == 1 == layer.window.out[0]
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
    weight = np.ascontiguousarray(layer.rows.T) if layer.depthwise else layer.rows  # depthwise: the channels last
    (_, h, w, c), (_, out_h, out_w, out_c), taps, strides, pads, dilations = layer.window
    bias = layer.bias_without(layer.input.zero)  # the library takes the zero off by itself
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
    fields = {
        **tables,
        "buffer": buffer_bytes(layer),
        "in": {"n": 1, "h": h, "w": w, "c": c},
        "taps": {
            "n": 1 if layer.depthwise else out_c,
            "h": taps[1],
            "w": taps[2],
            "c": out_c if layer.depthwise else c,
        },
        "out": {"n": 1, "h": out_h, "w": out_w, "c": out_c},
        "in_zero": layer.input.zero,
        **ends_of(layer),
    }
    for key, pair in (("stride", strides), ("pad", pads), ("dilation", dilations)):
        fields[key] = {"w": pair[2], "h": pair[1]}
    name = writer.function("cmsis_depthwise" if layer.depthwise else "cmsis_convolve")
    places = f"{writer.place(layer.input)}, {writer.place(layer.output)}, {writer.at(scratch_name(layer.name))}"
    yield f"    if ({name}({writer.struct('cmsis', layer.name, fields)}, {places}))\n        return 3;"
