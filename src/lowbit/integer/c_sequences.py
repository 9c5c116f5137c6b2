"""The steps of the C that call sequences.c: products of two values, Softmax, LayerNormalization, recurrences."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from lowbit.integer.c_writer import Writer, ends_of
from lowbit.integer.plan import scratch_name
from lowbit.integer.sequences import Normalize, Product, Recurrent, Softmax
from lowbit.integer.tensors import Ints, Rescale


def _product(writer: Writer, layer: Product) -> Iterator[str]:
    rows, columns = layer.output.shape[-2:]
    sizes = {"count": layer.output.size // (rows * columns), "rows": rows, "columns": columns, "depth": layer.depth}
    numbers = dict(zip(("multiplier", "shift", "left"), layer.rescale.numbers, strict=True))
    fields = sizes | {"zeros": (layer.a.zero, layer.b.zero)} | numbers | ends_of(layer)
    name = "product_twice" if writer.program.rounding == "twice" else "product"
    function = writer.function(name, layer.a.bits, layer.b.bits, layer.output.bits)
    given = ", ".join(map(writer.place, (layer.a, layer.b, layer.output)))
    yield f"    {function}({writer.struct('product', layer.name, fields)}, {given});"


def _by_rows(section: str, writer: Writer, layer: Softmax | Normalize, fields: Mapping[str, Any]) -> str:
    rows = {"rows": layer.input.size // layer.length, "length": layer.length}
    struct = writer.struct(section, layer.name, {**rows, **fields, **ends_of(layer)})
    function = writer.function(section, layer.input.bits, layer.output.bits)
    return f"    {function}({struct}, {writer.place(layer.input)}, {writer.place(layer.output)});"


def _softmax(writer: Writer, layer: Softmax) -> Iterator[str]:
    yield _by_rows("softmax", writer, layer, {"exponent": layer.exponent, "factor": layer.factor})


def _normalize(writer: Writer, layer: Normalize) -> Iterator[str]:
    tables = {
        key: writer.table("int32_t", f"{layer.name}_{key}", array)
        for key, array in (("weight", layer.weight), ("bias", layer.bias))
    }
    numbers = {"shift": layer.shift, "epsilon": layer.epsilon}
    yield _by_rows("normalize", writer, layer, tables | numbers)


def _recurrent(writer: Writer, layer: Recurrent) -> Iterator[str]:
    own = _gates(writer, f"{layer.name}_own", layer.recurrent, layer.bias_recurrent, layer.again)
    if layer.kind == "gru_before":
        own["rows"] = 2 * layer.hidden  # the others come behind the reset
    fields = {
        **{"steps": layer.steps, "hidden": layer.hidden, "reverse": int(layer.reverse)},
        "cells": layer.hidden if layer.kind == "lstm" else 0,
        "given": _gates(writer, f"{layer.name}_given", layer.weight, layer.bias, layer.rescale),
        "own": own,
        "next": writer.function(layer.kind),
    }
    struct = writer.struct("recurrent", layer.name, fields)
    writer.function("line", 16, 16)  # of tanh
    writer.function("gate", 16)  # h
    function = writer.function("recurrent", layer.input.bits)
    states = [*map(writer.place, layer.initial), "NULL", "NULL"][:2]
    given = ", ".join((writer.place(layer.input), *states, writer.place(layer.output)))
    yield f"    {function}({struct}, {given}, (int32_t *)(void *)({writer.at(scratch_name(layer.name))}));"


def _gates(writer: Writer, name: str, weight: Ints, bias: Ints, rescale: Rescale) -> dict[str, Any]:
    arrays = {
        "bias": ("int32_t", bias),
        "multiplier": ("int32_t", rescale.multiplier),
        "shift": ("uint8_t", rescale.shift),
    }
    tables = {key: writer.table(kind, f"{name}_{key}", array) for key, (kind, array) in arrays.items()}
    sizes = {"rows": len(weight), "inputs": weight.shape[1], "left": rescale.left}
    return {"weight": writer.table("int8_t", f"{name}_weight", weight)} | tables | sizes


SEQUENCE_STEPS: Mapping[type, Callable[[Writer, Any], Iterator[str]]] = MappingProxyType(
    {Product: _product, Softmax: _softmax, Normalize: _normalize, Recurrent: _recurrent}
)
"""Layer → the lines of C that compute it."""
