"""Where tensors lie in the arena: values that are never alive together share bytes.

Greedy by size: the largest value first, each at the lowest place that is free for as long as it lives (Pisarchyk and
Lee 2020, arXiv 2001.03288, section 5).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lowbit.integer.program import Conv, Program
from lowbit.integer.sequences import Recurrent
from lowbit.integer.weights import in_lanes, row_of

ALIGNMENT = 4  # bytes; int32 accumulators never lie in the arena


@dataclass(frozen=True)
class Slot:
    """One value in the arena; it is alive from step `first` to step `last`, both included.

    Step 0 is the call, in which inputs are written; layer i is step i + 1; outputs live to the end.
    """

    name: str
    offset: int
    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Slots by name; `bytes` is the arena's size, inputs and outputs included."""

    slots: dict[str, Slot]
    bytes: int

    def peak(self) -> int:
        """The step with the most bytes alive."""
        steps = range(max(slot.last for slot in self.slots.values()) + 1)
        return max(steps, key=self.alive)

    def alive(self, step: int) -> int:
        """Bytes of the values that are alive in a step."""
        return sum(slot.bytes for slot in self.slots.values() if slot.first <= step <= slot.last)


def scratch_name(layer: str) -> str:
    """The name of what a layer needs beside its input and output."""
    return f"{layer} (window)"


def scratch_bytes(layer: object) -> int:
    """The window of its input that a convolution gathers before it multiplies; a depthwise one unpacks its weights.

    A recurrent layer has all gates of a step, from the input and from its own state.
    """
    if isinstance(layer, Recurrent):
        return 2 * 4 * len(layer.weight)
    if not isinstance(layer, Conv):
        return 0
    if layer.depthwise:
        return layer.weight.size if layer.packed else 0
    if in_lanes(layer):
        return 0
    return row_of(layer) * layer.input.dtype.itemsize


def plan(program: Program, buffers: Mapping[str, int] = MappingProxyType({})) -> Plan:
    """A place for each value of the program; buffers: layer → bytes that it needs, where its own loops do not run."""
    slots: list[Slot] = []
    for name, size, first, last in sorted(_lifetimes(program, buffers), key=lambda life: (-life[1], life[2], life[0])):
        beside = sorted((s for s in slots if s.first <= last and first <= s.last), key=lambda s: s.offset)
        offset = 0
        for other in beside:
            if offset + size <= other.offset:
                break
            offset = max(offset, _aligned(other.offset + other.bytes))
        slots.append(Slot(name, offset, size, first, last))
    return Plan({slot.name: slot for slot in slots}, _aligned(max(s.offset + s.bytes for s in slots)))


def _lifetimes(program: Program, buffers: Mapping[str, int]) -> Iterator[tuple[str, int, int, int]]:
    """(name, bytes, first step, last step); views of one tensor have one name."""
    end = len(program.layers) + 1
    first = {t.name: 0 for t in program.inputs} | {
        layer.output.name: step for step, layer in enumerate(program.layers, 1)
    }
    last = dict(first)
    for step, layer in enumerate(program.layers, 1):
        last |= {t.name: step for t in layer.inputs}
        if size := buffers.get(layer.name, scratch_bytes(layer)):
            yield scratch_name(layer.name), size, step, step
    last |= {t.name: end for t in program.outputs}
    for tensor in program.tensors():
        yield tensor.name, tensor.bytes, first[tensor.name], last[tensor.name]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
