"""What a network computes: multiply-adds, bit operations, and an estimate of the energy that they and its weights take.

Energy in picojoules, 45 nm at 0.9 V: Horowitz 2014 (ISSCC, "Computing's energy problem", figure 1.1.9). A float32
multiplication takes 3.7 and an addition 0.9; of int8 0.2 and, in int32, 0.1; 64 bits out of DRAM take at least 1,300.
A multiplier's energy grows with the product of its operands' bits, so that of b_w × b_a bits takes 0.2 · b_w b_a / 64.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from lowbit.graph.layer import RECURRENT, layers_of

MULTIPLY_FLOAT, ADD_FLOAT, MULTIPLY_INT8, ADD_INT32 = 3.7, 0.9, 0.2, 0.1
DRAM_BIT = 1300 / 64


@dataclass(frozen=True)
class Operations:
    """Of one sample, in one network.

    multiply_adds      products that are summed, those of weights and those of two activations
    integer            how many of them are of integers
    bit_operations     Σ multiply-adds × bits of one operand × bits of the other; float32 counts 32 × 32
    compute_pj         energy of the multiply-adds
    weights_pj         energy of reading every stored weight from DRAM once
    """

    multiply_adds: int
    integer: int
    bit_operations: int
    compute_pj: float
    weights_pj: float

    @property
    def energy_pj(self) -> float:
        return self.compute_pj + self.weights_pj


def multiply_adds(program: ir.Model, shapes: Mapping[str, tuple[int, ...]], samples: int) -> dict[str, int]:
    """Node → multiply-adds of one sample; nodes that multiply nothing are left out.

    shapes   of the values of the program, for that many samples
    """
    found: dict[str, int] = {}
    for node in program.graph:
        read, made = (shapes.get(str(v.name)) if v is not None else None for v in (node.inputs[0], node.outputs[0])
                      ) if node.inputs else (None, None)  # fmt: skip
        layers = list(layers_of(node))
        count = 0
        if read is None or made is None:
            continue
        if layers and layers[0].kind.reads == "scattered":
            count = prod(read) // max(1, layers[0].inputs) * layers[0].weight.size
        elif layers and layers[0].kind.reads is not None:
            count = prod(made) // max(1, layers[0].outputs) * layers[0].weight.size
        elif node.op_type in RECURRENT:
            count = prod(read[:2]) * sum(layer.weight.size for layer in layers)
        elif node.op_type == "MatMul":
            count = prod(made) * read[-1]
        if count:
            found[str(node.name)] = count // max(1, samples)
    return found


def operations(counts: Mapping[str, int], bits: Mapping[str, tuple[int, int]], weight_bytes: int) -> Operations:
    """Totals of a network.

    bits   node → bits of its weights and activations, of the nodes that multiply integers; all others in float32
    """
    integer = bit_operations = 0
    energy = 0.0
    for node, count in counts.items():
        weight, activation = bits.get(node, (32, 32))
        bit_operations += count * weight * activation
        if node in bits:
            integer += count
            energy += count * (MULTIPLY_INT8 * weight * activation / 64 + ADD_INT32)
        else:
            energy += count * (MULTIPLY_FLOAT + ADD_FLOAT)
    return Operations(sum(counts.values()), integer, bit_operations, energy, 8 * weight_bytes * DRAM_BIT)
