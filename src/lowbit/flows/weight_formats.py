"""What each format would do to a model's own weights: noise and bytes, before anything is chosen."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lowbit.errors import InputError
from lowbit.graph.layer import Layer, layers_of
from lowbit.model import Model
from lowbit.network.weights import SMALLEST_WEIGHT, orient
from lowbit.numerics import measure, parse_format
from lowbit.ranges import MSE, Range
from lowbit.recipe import TensorSpec
from lowbit.solve import nearest

# One of each kind, from the largest to the smallest; group lengths as their papers have them.
COMPARED = (
    *("bf16", "int8 channel:0", "uint8 channel:0", "fixed8", "e4m3", "e5m2", "mxint8", "mxfp8_e4m3", "mx9", "vsq8"),
    *("int6 channel:0", "mxfp6_e2m3", "mxfp6_e3m2", "mx6", "int5 channel:0", "apot5 channel:0"),
    *("int4", "int4 channel:0", "int4 group:32", "uint4 group:32", "vsq4", "nvfp4", "mxfp4", "nf4", "e2m1 channel:0"),
    *("log4 channel:0", "apot4 channel:0", "pwlq4", "codebook4", "bases4 channel:0", "mx4"),
    *(
        "int3 channel:0",
        "int3 group:32",
        "codebook3",
        "bases3 channel:0",
        "int2 group:32",
        "codebook2",
        "bases2 channel:0",
    ),
    *("ternary channel:0", "binary channel:0"),
)


@dataclass(frozen=True)
class OnModel:
    """One format on the weights of a model.

    bits      per weight, scales and tables included
    bytes     of all those weights
    sqnr_db   mean over the weight tensors; worst_db the least of them, of the tensor `worst`
    """

    format: str
    bits: float
    bytes: int
    sqnr_db: float
    worst_db: float
    worst: str


def weights_on(model: Model) -> dict[str, Layer]:
    """The weights that recipes reach, by name; small tensors are left out."""
    found = {str(weight.value.name): weight for node in model.program.graph for weight in layers_of(node)}
    return {
        name: weight
        for name, weight in found.items()
        if weight.weight.dtype == np.float32 and weight.weight.size >= SMALLEST_WEIGHT and weight.weight.ndim > 1
    }


def formats_on(model: Model, formats: tuple[str, ...] = COMPARED, range: Range | None = None) -> list[OnModel]:
    """What each format does to the model's weights, most bits first. `range`: how bounds are chosen; default MSE."""
    weights = weights_on(model)
    if not weights:
        raise InputError(
            f"'{model.source}' has no float32 weight of {SMALLEST_WEIGHT} values or more to store in few bits."
        )
    rows = [_on_weights(words, weights, range or MSE()) for words in formats]
    return sorted(rows, key=lambda row: -row.bits)


def _on_weights(words: str, weights: Mapping[str, Layer], range: Range) -> OnModel:
    bits, count = 0.0, 0
    noise: dict[str, float] = {}
    for name, weight in weights.items():
        values = torch.from_numpy(np.array(weight.weight))
        kind = orient(parse_format(words), weight.output_axis, weight.summed_axis, weight.weight.shape)
        stored = nearest(values, TensorSpec(kind, range))
        bits, count = bits + stored.bits, count + values.numel()
        noise[name] = measure(values, stored).sqnr_db
    worst = min(noise, key=lambda name: noise[name])
    mean = float(np.mean([min(db, 200.0) for db in noise.values()]))
    return OnModel(words, bits / count, round(bits / 8), mean, noise[worst], worst)
