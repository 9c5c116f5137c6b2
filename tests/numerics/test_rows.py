"""Tiles: every granularity becomes rows and comes back."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lowbit.errors import ShapeError
from lowbit.numerics import ELEMENT, TENSOR, WHOLE, Block, channel, from_rows, group, tile, to_rows
from lowbit.numerics.rows import expand_tiles, tile_counts

shapes = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)


@st.composite
def shape_and_block(draw):
    shape = draw(shapes)
    axes = draw(st.lists(st.integers(0, len(shape) - 1), unique=True, max_size=3)) if shape else []
    lengths = {axis: draw(st.integers(0, 9)) for axis in axes}
    return shape, tile(lengths, rest=draw(st.sampled_from([1, WHOLE])))


@given(shape_and_block())
def test_rows_come_back_as_the_tensor(case):
    shape, block = case
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    rows = to_rows(x, block)
    assert rows.shape == (
        torch.Size(tile_counts(shape, block.tile(shape))).numel(),
        torch.Size(block.tile(shape)).numel(),
    )
    assert torch.equal(from_rows(rows, shape, block.tile(shape)), x)


@given(shape_and_block())
def test_one_number_for_each_tile_spreads_over_its_elements(case):
    shape, block = case
    extent = block.tile(shape)
    counts = tile_counts(shape, extent)
    numbers = torch.arange(torch.Size(counts).numel(), dtype=torch.float32)
    rows = numbers[:, None].expand(-1, torch.Size(extent).numel())
    assert torch.equal(expand_tiles(numbers.reshape(counts), shape, extent), from_rows(rows, shape, extent))


@pytest.mark.parametrize(
    ("block", "extent"),
    [
        (TENSOR, (8, 6, 3)),
        (ELEMENT, (1, 1, 1)),
        (channel(0), (1, 6, 3)),
        (channel(-1), (8, 6, 1)),
        (channel(0, 1), (1, 1, 3)),
        (group(4, axis=1), (1, 4, 1)),
        (group(64), (1, 1, 3)),
        (tile({0: 4, 1: 2}), (4, 2, 1)),
        (tile({0: 1, 1: 2}, rest=WHOLE), (1, 2, 3)),
    ],
)
def test_extent_of_a_tile(block, extent):
    assert block.tile((8, 6, 3)) == extent


def test_a_shorter_last_tile_repeats_its_last_element():
    assert to_rows(torch.tensor([1.0, 2, 3, 4, 5]), group(3)).tolist() == [[1, 2, 3], [4, 5, 5]]


def test_channels_of_a_weight_are_a_view_of_it():
    x = torch.zeros(4, 3, 3, 3)
    assert to_rows(x, channel(0)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    "block", [TENSOR, ELEMENT, channel(0), channel(0, 2), group(64), group(3, axis=0), tile({0: 2, 1: 3})]
)
def test_a_block_pastes_back(block):
    names = {"TENSOR": TENSOR, "ELEMENT": ELEMENT, "channel": channel, "group": group, "tile": tile, "WHOLE": WHOLE}
    assert eval(repr(block), names) == block


def test_an_axis_that_is_not_there_is_named():
    with pytest.raises(ShapeError, match=r"channel\(3\) needs an axis 3, but the tensor has shape \(2, 2\)"):
        channel(3).tile((2, 2))


def test_a_tile_has_at_least_one_element():
    with pytest.raises(ShapeError, match="-2 elements"):
        group(-2)


def test_a_scalar_is_one_row():
    assert to_rows(torch.tensor(3.0), Block()).tolist() == [[3.0]]
