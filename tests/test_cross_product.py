"""The multiplication table: every grid × block × stored scale × range × rounding works or says why not."""

from itertools import product

import pytest
import torch

from lowbit.errors import InputError, LowbitError, UnsupportedError
from lowbit.numerics import (
    ELEMENT,
    TENSOR,
    WHOLE,
    AdditivePow2,
    Bases,
    Block,
    Codebook,
    Fitted,
    Float,
    Format,
    Int,
    KMeans,
    Piecewise,
    SignedPow2,
    channel,
    group,
    parse_rounding,
    quantize,
    tile,
    to_rows,
)
from lowbit.numerics.grids import E2M1, E4M3, E5M2, E8M0, FLOAT16, NF4_VALUES, Grid
from lowbit.ranges import RANGES, Histogram, Range, RawRows

GRIDS: list[Grid | Fitted] = [
    Int(1, signed=False),
    Int(2, narrow=True),
    Int(4),
    Int(8, signed=False),
    Int(16),
    E4M3,
    E5M2,
    E2M1,
    Float(3, 0),
    SignedPow2(4),
    AdditivePow2(5),
    Codebook((-1.0, 1.0)),
    Codebook(NF4_VALUES),
    KMeans(2),
    Bases(2),
    Piecewise(3),
]
# The tensor is (5, 6, 7): group(4), tile 2 × 4 and tile 2 × 3 leave shorter last tiles.
BLOCKS = [
    TENSOR,
    channel(0),
    channel(-1),
    channel(0, 2),
    group(4),
    group(3, axis=1),
    tile({0: 2, 1: 4}),
    tile({0: 2, 1: 3}, rest=WHOLE),
    ELEMENT,
]
SCALES = [
    None,
    Format(E8M0, None, rounding="up"),
    Format(E8M0, None, rounding="down"),
    Format(FLOAT16, None),
    Format(Int(4, signed=False), channel(0)),
    Format(E4M3),
]
ROUNDINGS = ["nearest", "up", "down", "toward_zero", "stochastic:1"]


def tensor() -> torch.Tensor:
    x = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0))
    x[2] = 0
    x[3] = x[3].abs()
    return x


def a_range(name: str) -> Range:
    return RANGES[name]()


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_every_combination_is_finite_and_in_shape_or_refused_in_words(grid, affine):
    x, done = tensor(), 0
    for block, name in product(BLOCKS, RANGES):
        if isinstance(grid, Fitted) and name not in ("minmax", "mse"):
            continue  # a fit takes the place of a range's search
        bounds = None
        for scale in SCALES:
            try:
                kind = Format(grid, block, scale, affine)
            except (InputError, UnsupportedError) as error:
                assert len(str(error)) > 40  # noqa: PT017
                continue
            if bounds is None:
                bounds = a_range(name).bounds(RawRows(to_rows(x, block)), kind)
                assert bounds[0].shape == bounds[1].shape == (len(to_rows(x, block)), 1)
            for rounding in ROUNDINGS if name == "minmax" else ROUNDINGS[:1]:
                stored = quantize(x, kind, bounds, rounding)
                back = stored.dequantize()
                assert torch.isfinite(back).all(), (kind, name, rounding)
                assert back.shape == stored.codes.shape == x.shape
                assert stored.tiles == stored.scale_values().shape == stored.zero_values().shape
                done += 1
    refused = isinstance(grid, Fitted) and affine
    assert refused or done >= len(BLOCKS) * 2


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", [name for name in RANGES if name != "minmax"])
def test_every_range_meets_every_rounding(name, rounding):
    x = tensor()
    for grid, block in product(GRIDS, (TENSOR, channel(0))):
        kind = Format(grid, block)
        bounds = a_range(name).bounds(RawRows(to_rows(x, block)), kind)
        assert torch.isfinite(quantize(x, kind, bounds, parse_rounding(rounding)).dequantize()).all()


@pytest.mark.parametrize("name", RANGES)
def test_every_range_reads_a_histogram_for_every_grid(name):
    for block, grid in product((TENSOR, channel(0)), GRIDS):
        histogram = Histogram(block)
        histogram.add(tensor())
        lo, hi = a_range(name).bounds(histogram, Format(grid, block))
        assert (lo <= hi).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_grid_takes_every_float(dtype):
    for grid, block in product(GRIDS, (TENSOR, group(4))):
        assert quantize(tensor().to(dtype), Format(grid, block)).dequantize().dtype == dtype


def test_scales_of_scales_go_three_deep():
    deep = Format(
        Int(4), group(2), scale=Format(Int(4, signed=False), group(2), scale=Format(E4M3, scale=Format(E8M0, None)))
    )
    back = quantize(tensor(), deep).dequantize()
    assert torch.isfinite(back).all()
    assert deep.bits_per_element() == 4 + 4 / 2 + 8 / 4


def test_a_block_that_does_not_fit_the_shape_is_refused():
    for grid in GRIDS:
        with pytest.raises(LowbitError, match="needs an axis 5"):
            quantize(tensor(), Format(grid, Block(((5, 2),), 1)))
