"""The integer forms of what transformers and recurrent networks have: see sequences.py for the layers.

Each form takes the layers so far, to which it appends the copies that it needs; recurrent ones append themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from lowbit.errors import UnsupportedError
from lowbit.graph.layer import number
from lowbit.integer import forms
from lowbit.integer.forms import Read
from lowbit.integer.layout import copied, in_order
from lowbit.integer.program import Add, Layer
from lowbit.integer.sequences import CELL, GATE, STATE, Normalize, Product, Recurrent, Softmax, fixed
from lowbit.integer.tensors import Ints, Rescale, Tensor
from lowbit.integer.values import Coded, Constant, Waiting


def product(layers: list[Layer], node: ir.Node, read: Read) -> Waiting:
    """A MatMul of two activations; the second lies with its last two axes turned."""
    a, b = (forms.data_of(read, index) for index in (0, 1))
    shape = forms.shape_of(node)
    rank = len(shape)
    natural = tuple(range(rank))
    first = in_order(layers, Coded(a), natural).tensor
    second = in_order(layers, Coded(b), (*natural[:-2], rank - 1, rank - 2)).tensor if len(b.shape) == rank else b
    if rank < 2 or second.shape[:-2] != first.shape[:-2]:
        raise UnsupportedError("a product of two values that are repeated along leading axes")
    if first.bits <= 8 and first.shape[-1] >= 1 << 15:
        raise UnsupportedError(f"a sum of {first.shape[-1]:,} products of two values, which can leave 32 bits")

    def finish(output: Tensor, low: int, high: int) -> Layer:
        rescale = Rescale.of(first.scale * second.scale / output.scale)
        return Product(output.name, first, second, output, rescale, low, high)

    return Waiting(finish, shape, natural)


def softmax(layers: list[Layer], node: ir.Node, read: Read) -> Waiting:
    data = _innermost(layers, node, read)

    def finish(output: Tensor, low: int, high: int) -> Layer:
        exponent = fixed(data.scale * np.log2(np.e) * 2.0**16)
        return Softmax(output.name, data, output, exponent, fixed(2.0**-30 / output.scale), low, high)

    return Waiting(finish, forms.shape_of(node), data.order)


def normalize(layers: list[Layer], node: ir.Node, read: Read) -> Waiting:
    data = _innermost(layers, node, read)
    gain, shift = (_numbers(read.get(index), data.shape[-1]) for index in (1, 2))
    epsilon = number(node, "epsilon", 1e-5)

    def finish(output: Tensor, low: int, high: int) -> Layer:
        factors = (np.ones(data.shape[-1]) if gain is None else gain) * 2.0**-12 / output.scale
        _, places = fixed(float(np.abs(factors).max(initial=1e-9)), 29)
        bias = np.rint((np.zeros(data.shape[-1]) if shift is None else shift) * 2.0**8 / output.scale)
        if np.abs(bias).max() >= 2**31:
            raise UnsupportedError("a bias that does not fit in 32 bits")
        weight = np.rint(factors * 2.0**places).astype(np.int32)
        added = round(data.shape[-1] ** 2 * epsilon / data.scale**2)
        return Normalize(output.name, data, output, weight, bias.astype(np.int32), places, added, low, high)

    return Waiting(finish, forms.shape_of(node), data.order)


def _innermost(layers: list[Layer], node: ir.Node, read: Read) -> Tensor:
    """What the node reads, with the axis that it works along innermost in memory."""
    data = forms.data_of(read)
    rank = len(data.order)
    if int(number(node, "axis", -1)) % rank != rank - 1:
        raise UnsupportedError("along another axis than the last")
    keeps = data.order if data.order[-1] == rank - 1 else tuple(range(rank))
    return in_order(layers, Coded(data), keeps).tensor


def _numbers(given: Coded | Constant | None, length: int) -> "np.ndarray | None":
    if given is None:
        return None
    if not isinstance(given, Constant) or given.array.size not in (1, length):
        raise UnsupportedError("a gain or bias that is computed")
    return np.broadcast_to(given.real().astype(np.float64).reshape(-1), (length,))


def rescaled(layers: list[Layer], held: Tensor, name: str, scale: float, zero: int, bits: int) -> Coded:
    """The same values in codes of another scale: a sum with nothing."""
    target = replace(held, name=name, scale=scale, zero=zero, bits=bits)
    nothing = Constant(np.zeros((), np.int8), np.ones(()))
    made = forms.add(Coded(held), nothing).finish(target, *target.ends)
    assert isinstance(made, Add)
    layers.append(replace(made, multipliers=(made.multipliers[0], 0)))
    return Coded(target)


def recurrent(layers: list[Layer], node: ir.Node, read: Read) -> dict[str, Coded]:
    """An LSTM, GRU or RNN: a layer for each direction, and its outputs as copies of rows of theirs."""
    data = in_order(layers, Coded(forms.data_of(read)), tuple(range(3))).tensor
    batch = data.shape[0 if number(node, "layout") else 1]
    if batch != 1 or read.get(4) is not None:
        raise UnsupportedError("a recurrent layer over several samples, or with lengths of sequences")
    w, r = (forms.weight_of(read[index], 1) for index in (1, 2))
    gates, bias = w.array.shape[1], read.get(3)
    both = np.zeros((len(w.array), 2 * gates)) if bias is None else np.asarray(_constant(bias).real(), np.float64)
    steps = GATE * np.ones(gates)
    sigmoids = gates - r.array.shape[2]
    steps[:sigmoids] *= 2  # they read half their argument
    states, way, made = _states(layers, node, read), node.attributes.get_string("direction") or "forward", []
    for direction in range(len(w.array)):
        parts = [_part(weight, direction, side) for weight, side in ((w, data.scale), (r, STATE))]
        biases = [np.rint(b / p) for b, (_, p) in zip(np.split(both[direction], 2), parts, strict=True)]
        biases[0] -= data.zero * parts[0][0].astype(np.int64).sum(1)
        if max(np.abs(b).max() for b in biases) >= 2**31:
            raise UnsupportedError("a bias that does not fit in 32 bits")
        output = _rows(node, direction, data.size // w.array.shape[2], r.array.shape[2])
        initial = tuple(_of_direction(layers, state, direction) for state in states)
        (weight, given), (again, own) = parts
        first, second = (b.astype(np.int32) for b in biases)
        layers.append(
            Recurrent(
                output.name, _kind(node), data, initial, output, weight, again, first, second,
                Rescale.of(given / steps), Rescale.of(own / steps), way == "reverse" or direction == 1,
            )
        )  # fmt: skip
        made.append(output)
    return _outputs(layers, node, made, way)


def _kind(node: ir.Node) -> str:
    before = node.op_type == "GRU" and not number(node, "linear_before_reset")
    return node.op_type.lower() + "_before" * before


def _rows(node: ir.Node, direction: int, steps: int, hidden: int) -> Tensor:
    name = f"{next(v.name for v in node.outputs if v.name)}.{'backward' if direction else 'states'}"
    return Tensor(name, (steps + (node.op_type == "LSTM"), hidden), (0, 1), STATE, 0, 16)


def _part(weight: Constant, direction: int, scale: float) -> tuple[Ints, np.ndarray]:
    """Codes of one direction, and what a product with them stands for."""
    assert weight.scale is not None
    codes = np.ascontiguousarray(weight.array[direction])
    return codes, np.broadcast_to(weight.scale.astype(np.float64).reshape(-1), (len(codes),)) * scale


def _constant(given: Coded | Constant) -> Constant:
    if not isinstance(given, Constant):
        raise UnsupportedError("a bias that is computed")
    return given


def _states(layers: list[Layer], node: ir.Node, read: Read) -> list[Tensor]:
    """Initial h, and c of an LSTM, in 16 bits; none where all are zeros."""
    found: list[Tensor] = []
    for index, step in ((5, STATE), (6, CELL))[: 2 if node.op_type == "LSTM" else 1]:
        given = read.get(index)
        if given is None or (isinstance(given, Constant) and not given.array.any()):
            continue
        held = in_order(layers, Coded(forms.data_of(read, index)), tuple(range(3))).tensor
        found.append(rescaled(layers, held, f"{held.name}.of.{node.outputs[0].name}", step, 0, 16).tensor)
    if found and node.op_type == "LSTM" and len(found) < 2:
        raise UnsupportedError("an LSTM with one of its two initial states")
    return found


def _of_direction(layers: list[Layer], state: Tensor, direction: int) -> Tensor:
    index = np.arange(state.size).reshape(-1, state.shape[-1])
    if len(index) == 1:
        return state
    return copied(layers, f"{state.name}.{direction}", [state], index[direction][None], (0, 1)).tensor


def _outputs(layers: list[Layer], node: ir.Node, made: Sequence[Tensor], way: str) -> dict[str, Coded]:
    """Y, the last state of each direction, and an LSTM's last cell state, by name."""
    rows = [np.arange(t.size).reshape(t.shape) + n * t.size for n, t in enumerate(made)]
    steps = len(rows[0]) - (node.op_type == "LSTM")
    last = [part[0 if way == "reverse" or n else steps - 1] for n, part in enumerate(rows)]
    wanted = [np.stack([part[:steps] for part in rows], 1), np.stack(last), np.stack([part[-1] for part in rows])]
    found = {}
    for index, (value, where) in enumerate(zip(node.outputs, wanted, strict=False)):
        if value.name and (value.uses() or value.is_graph_output()):
            shape = tuple(int(d) for d in value.shape or ())  # type: ignore[arg-type]
            sources = [replace(t, scale=CELL) for t in made] if index == 2 else list(made)
            order = tuple(range(len(shape)))
            found[str(value.name)] = copied(layers, str(value.name), sources, where.reshape(shape), order)
    return found


SEQUENCES: Mapping[str, Callable[[list[Layer], ir.Node, Read], Waiting]] = MappingProxyType(
    {"MatMul": product, "Softmax": softmax, "LayerNormalization": normalize}
)
"""Operator → its form, which reads activations only; MatMul of two."""
