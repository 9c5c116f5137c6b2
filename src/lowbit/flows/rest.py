"""Constants that stay float, rounded as a recipe's `rest` says: of a program, or of a network that has trained."""

from collections.abc import Collection
from dataclasses import replace

import onnx_ir as ir
import torch
from torch import Tensor

from lowbit.graph.halves import LEAST
from lowbit.network.network import Network
from lowbit.numerics.mantissa import fewer_mantissa_bits
from lowbit.recipe import Recipe


def round_constants(program: ir.Model, recipe: Recipe, quantized: Collection[str]) -> int:
    """Round them in place; how many numbers that are.

    quantized   constants that get codes. They are rounded to float16, too: a step may leave their layer in float
    """
    count = 0
    for name, value in program.graph.initializers.items():
        held = value.const_value
        if held is not None and held.dtype == ir.DataType.FLOAT and (recipe.rest == "float16" or name not in quantized):
            before = torch.from_numpy(held.numpy().copy())
            if (after := _rounded(before, recipe)) is not before:
                value.const_value = ir.tensor(after.numpy(), name=name)
                count += after.numel()
    return count


@torch.no_grad()
def round_parameters(network: Network, recipe: Recipe) -> None:
    """Round float parameters, and tables of what is stored, in place. Pruned weights that stay float keep theirs."""
    constants = network.constants()
    for name in network.module.meta["keys"]:
        parameter = network.parameter(name)
        if name not in constants and parameter.dtype == torch.float32 and parameter.requires_grad:
            parameter.copy_(_rounded(parameter, recipe))
    for _, quantizer in constants.values():
        stored = quantizer.stored
        if stored is not None and stored.table is not None:
            # An error of half a bit of mantissa stays under 1/32 of the distance between equally spaced values.
            needed = min(23, max(recipe.mantissa_bits, stored.table.shape[1].bit_length() + 2))
            table = fewer_mantissa_bits(torch.as_tensor(stored.table), needed)
            quantizer.store(replace(stored, table=table))


def _rounded(numbers: Tensor, recipe: Recipe) -> Tensor:
    """float32 numbers; all as they are where float16 is asked for and one is beyond it, or they are too few for it."""
    if recipe.rest == "float16":
        half = numbers.half().float()
        return half if numbers.numel() >= LEAST and bool(half.isfinite().all()) else numbers
    return fewer_mantissa_bits(numbers, recipe.mantissa_bits)
