"""Formats: their cost, their words, their refusals."""

from dataclasses import replace

import pytest
import torch

from lowbit.errors import InputError, UnsupportedError
from lowbit.numerics import (
    ELEMENT,
    FORMATS,
    TENSOR,
    AdditivePow2,
    Bases,
    Codebook,
    Float,
    Format,
    Int,
    KMeans,
    Piecewise,
    Pow2,
    SignedPow2,
    channel,
    fixed_point,
    group,
    parse_format,
    quantize,
    spell_format,
    tile,
)

NAMES = {
    f.__name__: f
    for f in (
        Format,
        Int,
        Float,
        Pow2,
        SignedPow2,
        AdditivePow2,
        Codebook,
        KMeans,
        Bases,
        Piecewise,
        channel,
        group,
        tile,
    )
} | {"TENSOR": TENSOR, "ELEMENT": ELEMENT}


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("vsq4", 4.25),
        ("mx4", 4),
        ("mx6", 6),
        ("mx9", 9),
        ("mxfp4", 4.25),
        ("mxfp6_e2m3", 6.25),
        ("mxfp8_e4m3", 8.25),
        ("mxint8", 8.25),
        ("nvfp4", 4.5),
        ("nf4", 4.5),
        ("int8", 8),
        ("int4 group:64", 4.5),
        ("uint4 group:64", 4.5625),
        ("int4 group:32 scale:fp16", 4.5),
    ],
)
def test_effective_bits(name, bits):
    assert parse_format(name).bits_per_element() == bits


def test_effective_bits_of_a_shape_count_every_scale():
    # 4 bits, 4 for each 16 elements, 32 for each of 64 channels of 256
    assert FORMATS["vsq4"].bits_per_element((64, 256)) == 4 + 4 / 16 + 32 / 256


def test_a_codebook_costs_its_table():
    assert FORMATS["codebook4"].bits_per_element((100, 100)) == 4 + 16 * 32 / 10_000


@pytest.mark.parametrize("words", ["codebook3", "bases3", "bases8", "pwlq4", "pwlq8 channel:0", "bases2 group:16"])
def test_a_fitted_grid_costs_the_table_that_is_stored(words):  # bases8 was said to cost 8 numbers, and held 256
    stored = quantize(torch.randn(16, 64), words)
    numbers = stored.table.numel()
    assert stored.bits == pytest.approx(stored.codes.numel() * stored.format.grid.bits + 32 * numbers)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_pastes_back(name):
    assert eval(repr(FORMATS[name]), NAMES) == FORMATS[name]


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_comes_back_from_its_words(name):
    assert parse_format(spell_format(FORMATS[name])) == FORMATS[name]


@pytest.mark.parametrize(
    ("words", "format"),
    [
        ("int4 group:64", Format(Int(4), group(64))),
        ("INT4, group:64:0", Format(Int(4), group(64, axis=0))),
        ("uint8 channel:1", Format(Int(8, signed=False), channel(1), zero_point=True)),
        ("int8 narrow channel", Format(Int(8, narrow=True), channel(0))),
        ("int8 tile:16x32", Format(Int(8), tile({-2: 16, -1: 32}))),
        ("mx6 axis:1", FORMATS["mx6"].along(1)),
        ("mx6 axis:1 tile:1x0x0", FORMATS["mx6"].along(1).with_block(tile({-3: 1, -2: 0, -1: 0}))),
        ("nf4 axis:0", Format(FORMATS["nf4"].grid, group(64, axis=0))),
        (
            "vsq4 axis:0 scale_channel:1",
            replace(FORMATS["vsq4"].along(0), scale=Format(Int(4, signed=False), channel(1))),
        ),
        ("e3m4", FORMATS["e3m4"]),
        ("e3m3", Format(Float(3, 3))),
        ("int16 scale:2^-15", fixed_point(16, -15)),
        ("int4 channel:0 scale:2^3", Format(Int(4), channel(0), scale=Format(Pow2(0, 3), None))),
        ("int8 affine rounding:stochastic:7", Format(Int(8), zero_point=True, rounding="stochastic:7")),
        ("codebook:4:linear channel:0", Format(KMeans(4, "linear"), channel(0))),
    ],
)
def test_words_make_a_format(words, format):
    assert parse_format(words) == format
    assert parse_format(spell_format(format)) == format


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("int44", "Did you mean int4"),
        ("", "Formats are: int2"),
        ("int4 groups:64", "Options are: tensor, element"),
        ("int4 group:many", "group:many"),
        ("int4 rounding:sideways", "sideways"),
        ("int4 scale:codebook4", "fitted"),
        ("codebook9", "bits must be 1 to 8"),
        ("int8 scale:2^", r"'scale:2\^' in format 'int8 scale:2\^': behind 2\^ is a whole number from -126 to 127"),
        ("int16 scale:2^-400", "a whole number from -126 to 127, as in scale:2"),
        ("int8 scale:2^-7 scale_channel:0", "a grid of 0 bits is one number"),
    ],
)
def test_words_that_mean_nothing_are_answered_with_what_does(words, message):
    with pytest.raises(InputError, match=message):
        parse_format(words)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Format(Int(8), None, zero_point=True),
        lambda: Format(KMeans(4), scale=Format(Int(8))),
        lambda: Format(Int(8), reach=-1.0),
        lambda: Format(Int(1)),  # −1 and 0: no scale puts a range on 0
        lambda: Format(Codebook((-2.0, -1.0))),
        lambda: Format(Int(8), rounding="odd"),
        lambda: Format(Pow2(0, -7)),  # a block would have a scale that data moves
    ],
)
def test_fields_that_contradict_each_other_are_refused(make):
    with pytest.raises(InputError):
        make()


def test_a_zero_point_needs_its_own_scale():
    with pytest.raises(UnsupportedError, match="a zero point needs a scale of its own"):
        Format(Int(4), group(16), scale=Format(Int(4, signed=False)), zero_point=True)


def test_a_block_can_be_exchanged():
    assert FORMATS["int8"].with_block(channel(0)) == Format(Int(8), channel(0))


def test_measured_bits_are_the_promised_ones():
    x = torch.randn(32, 64)
    stored = quantize(x, "mxfp4")
    scales = stored.scale
    assert stored.bits == x.numel() * 4 + scales.codes.numel() * 8 == x.numel() * 4.25
