"""Ranges: what each finds, on data whose answer is known."""

import numpy as np
import pytest
import torch

from lowbit.errors import InputError
from lowbit.numerics import FORMATS, TENSOR, Format, Int, channel, quantize, to_rows
from lowbit.numerics.formats import BINARY, INT4, INT8, MXFP4, NF4, TERNARY, UINT4, UINT8
from lowbit.ranges import (
    ACIQ,
    MSE,
    OCTAV,
    RANGES,
    Auto,
    Entropy,
    Histogram,
    MeanStd,
    MinMax,
    MovingAverage,
    Percentile,
    RawRows,
    error,
    parse_range,
    range_words,
)
from lowbit.ranges.analytic import fits_laplace

UINT4_SYMMETRIC = Format(Int(4, signed=False))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laplace(n: int) -> torch.Tensor:
    share = (torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5
    return (-share.sign() * torch.log(1 - 2 * share.abs())).float()


def histogram(x: torch.Tensor) -> Histogram:
    h = Histogram()
    h.add(x)
    return h


def noise(x: torch.Tensor, format: Format, bounds: tuple) -> float:
    return error(x, format, bounds).mse


SOURCES = {
    "normal": normal(50_000),
    "relu": normal(50_000).relu(),
    "gelu": torch.nn.functional.gelu(2 * normal(50_000)),
    "shifted": normal(50_000) + 3,
    "negative": -normal(50_000).abs() - 1,
    "outliers": torch.cat([normal(50_000), torch.tensor([60.0, -45.0])]),
    "laplace": laplace(50_000),
    "sparse": normal(50_000) * (normal(50_000, seed=1) > 1),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["int8", "uint8", "int4", "uint4"])
def test_mse_is_within_a_hundredth_of_a_full_search(source, name):
    x, kind = SOURCES[source], FORMATS[name]
    rows = to_rows(x[:2000], TENSOR)
    found = noise(rows, kind, MSE().bounds(RawRows(rows), kind))
    lo, hi = float(rows.min()), float(rows.max())
    shares = np.geomspace(0.03, 1, 40)
    if kind.zero_point and lo < 0 < hi:
        tried = [noise(rows, kind, (lo * a, hi * b)) for a in shares for b in shares]
    else:
        tried = [noise(rows, kind, (lo * a, hi * a)) for a in np.geomspace(0.03, 1, 200)]
    assert found <= min(tried) * 1.01


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", FORMATS)
def test_mse_is_never_worse_than_minmax(source, name):
    kind, x = FORMATS[name], SOURCES[source][:4096].reshape(16, 256)
    if kind.block is None:
        pytest.skip("without a scale there is no range")
    assert error(x, kind, range="mse").mse <= error(x, kind, range="minmax").mse * 1.0001


@pytest.mark.parametrize(("name", "db"), [("mx9", 46.3), ("mx6", 28.1), ("mx4", 15.6), ("nvfp4", 21.0), ("vsq4", 21.4)])
@pytest.mark.parametrize("range_", ["mse", "auto"])
def test_scales_that_share_a_scale_are_searched_as_they_are_stored(range_, name, db):
    # Taken for free scales: mx9 15.6, mx6 20.9, mx4 12.6 dB, because a scale a little smaller is stored a binade lower.
    x = normal(64, 256)
    assert error(x, name, range=range_).sqnr_db > db
    assert error(x, name, range=range_).mse <= error(x, name).mse


@pytest.mark.parametrize("kind", ["mx9", "mx6 axis:0", "vsq4 axis:0 scale_channel:1", "nvfp4 axis:1"])
def test_the_second_scale_follows_the_axes_of_the_tensor(kind):
    x = normal(32, 48, 3)
    assert error(x, kind, range="mse").mse <= error(x, kind).mse


@pytest.mark.parametrize("exponent", [-90, -60, 60, 100])
@pytest.mark.parametrize("name", ["int8", "uint4", "nf4", "e2m1", "mx6", "vsq4"])
def test_a_power_of_two_on_the_data_moves_the_bounds_with_it(name, exponent):
    x = normal(16, 64)
    scaled, kind = torch.ldexp(x, torch.tensor(exponent)), FORMATS[name]
    for range_ in (MSE(), Auto(), OCTAV(), ACIQ()):
        plain, moved = (range_.bounds(RawRows.of(v, kind.block), kind) for v in (x, scaled))
        for a, b in zip(plain, moved, strict=True):
            assert torch.allclose(torch.ldexp(a, torch.tensor(exponent)), b, rtol=1e-6)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("range_", [*(make() for name, make in RANGES.items() if name != "moving_average")], ids=repr)
@pytest.mark.parametrize("name", ["int8", "uint8", "int4", "uint4"])
def test_a_histogram_answers_as_the_raw_data_would(source, range_, name):
    x, kind = SOURCES[source], FORMATS[name]
    raw, counted = range_.bounds(RawRows.of(x), kind), range_.bounds(histogram(x), kind)
    slack = 1.03 if isinstance(range_, Entropy) else 1.01  # divergence is flat around its least
    assert noise(x, kind, counted) <= noise(x, kind, raw) * slack + 1e-12
    if not isinstance(range_, MSE | Entropy | Auto):  # these have near-equal optima far apart
        for a, b in zip(raw, counted, strict=True):
            assert float(b) == pytest.approx(float(a), rel=0.01, abs=1e-6)


@pytest.mark.parametrize("kind", [UINT8, INT8, UINT4_SYMMETRIC], ids=["uint8", "int8", "uint4 symmetric"])
def test_bounds_stay_within_the_data(kind):
    for x in SOURCES.values():
        for make in RANGES.values():
            lo, hi = make().bounds(histogram(x), kind)
            assert float(x.min()) - 1e-6 <= float(lo) <= float(hi) <= float(x.max()) + 1e-6


def test_an_affine_search_moves_both_ends_apart():
    x = torch.cat([normal(10_000).abs() * 0.1, torch.tensor([50.0, -1.0])])
    lo, hi = (float(b) for b in MSE().bounds(RawRows.of(x), UINT4))
    assert -1 <= lo <= 0
    assert hi < 50 or noise(x, UINT4, (lo, hi)) <= noise(x, UINT4, (-1.0, 50.0))


def test_rows_are_searched_each_for_itself():
    x = normal(16, 500) * torch.logspace(-2, 2, 16)[:, None]
    together = MSE().bounds(RawRows(x), INT4)
    alone = [MSE().bounds(RawRows(row[None]), INT4) for row in x]
    assert torch.allclose(together[1], torch.cat([hi for _, hi in alone]))


def test_binary_weights_take_the_mean_magnitude():  # Rastegari et al. 2016, eq. 6
    x = normal(10_000)
    bounds = MSE().bounds(RawRows.of(x), BINARY)
    assert float(quantize(x, BINARY, bounds).scale_values()) == pytest.approx(float(x.abs().mean()), rel=0.01)


def test_ternary_weights_come_near_their_optimum():  # a normal source leaves 0.1902 with three levels (Max 1960)
    x = normal(100_000)
    assert noise(x, TERNARY, MSE().bounds(RawRows.of(x), TERNARY)) == pytest.approx(0.1902, rel=0.02)


@pytest.mark.parametrize("kind", [MXFP4, NF4], ids=["mxfp4", "nf4"])
def test_mse_serves_grouped_tables(kind):
    x = normal(32, 128)
    assert kind.block is not None
    rows = RawRows.of(x, kind.block)
    assert noise(x, kind, MSE().bounds(rows, kind)) <= noise(x, kind, MinMax().bounds(rows, kind))


def test_octav_finds_the_bound_of_least_noise():
    x = normal(100_000)
    s = float(OCTAV().bounds(RawRows.of(x), INT4)[1])
    scan = {t: noise(x, Format(Int(4, narrow=True), reach=7.5), (-t, t)) for t in np.linspace(1.5, 4, 51)}
    assert s == pytest.approx(min(scan, key=scan.get), rel=0.06)


def test_a_bound_around_zero_puts_the_zero_of_an_affine_format_on_a_code():
    x = torch.cat([laplace(10_000), torch.tensor([30.0, 29.0, 28.0])])  # a little more to keep above zero
    lo, hi = OCTAV().bounds(RawRows.of(x), UINT4)
    assert hi / (hi - lo) * 15 == pytest.approx(8)  # rather than 7.5
    lo, hi = OCTAV().bounds(RawRows.of(-x), UINT4)
    assert hi / (hi - lo) * 15 == pytest.approx(7)


def test_octav_spends_all_codes_on_one_side():
    x = normal(100_000).relu()
    signed, unsigned = (float(OCTAV().bounds(RawRows.of(x), kind)[1]) for kind in (INT4, UINT4_SYMMETRIC))
    assert unsigned > signed


@pytest.mark.parametrize(
    ("x", "laplacian"), [(normal(20_000), False), (laplace(20_000), True)], ids=["gauss", "laplace"]
)
def test_aciq_sees_which_distribution_fits(x, laplacian):
    b, sigma = x.abs().mean(), x.std()
    assert bool(fits_laplace(b, sigma)) is laplacian
    auto, named = ACIQ("auto"), ACIQ("laplace" if laplacian else "gauss")
    assert float(auto.bounds(RawRows.of(x), INT8)[1]) == float(named.bounds(RawRows.of(x), INT8)[1])


def test_aciq_takes_one_sided_data_for_half_a_distribution():
    x = normal(100_000).relu()
    # σ of the whole is 1; 4 bits over one side are 5 over both: α = 2.94
    assert float(ACIQ("gauss").bounds(RawRows.of(x), UINT4)[1]) == pytest.approx(2.94, rel=0.01)


def test_entropy_keeps_a_flat_distribution_whole():
    x = torch.linspace(-1, 1, 100_000)
    assert float(Entropy().bounds(RawRows.of(x), INT8)[1]) > 0.95


@pytest.mark.parametrize("words", ["int4 group:16", "int4 group:64", "int8 channel:0", "nvfp4", "mxfp4"])
def test_entropy_leaves_blocks_of_few_values_whole(words):  # it gave 0.9, 2.4, 31.1, 1.0 and 1.3 dB
    x = normal(64, 256)
    assert error(x, words, range="entropy") == error(x, words)


def test_entropy_clips_rare_large_values_however_much_they_matter():
    # 1 in 10,000 values is ten times as large as the rest: MSE keeps them, divergence does not see them.
    x = torch.cat([normal(50_000), 10 + normal(5)])
    entropy, mse = (float(r.bounds(RawRows.of(x), INT8)[1]) for r in (Entropy(), MSE()))
    assert entropy < 0.6 * mse


def test_mean_and_deviation():
    lo, hi = MeanStd(2).bounds(RawRows.of(normal(100_000) + 5), INT8)
    assert (float(lo), float(hi)) == (pytest.approx(3, abs=0.02), pytest.approx(7, abs=0.02))


@pytest.mark.parametrize("make", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("x", [torch.zeros(10), torch.full((10,), 2.0), torch.full((10,), -2.0), torch.tensor([1.0])])
@pytest.mark.parametrize("kind", [INT8, UINT8], ids=["int8", "uint8"])
def test_constant_data_have_a_range_that_keeps_them(make, x, kind):
    bounds = make().bounds(histogram(x), kind)
    assert torch.allclose(quantize(x, kind, bounds).dequantize(), x, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("words", [*RANGES, "percentile:99.9", "moving_average:0.5", "aciq:laplace", "mean_std:4"])
def test_a_range_comes_back_from_its_words(words):
    assert range_words(parse_range(words)) == words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("minimax", "Ranges are: minmax"),
        ("mse:3", "takes no argument"),
        ("percentile:3", "over 50"),
        ("aciq:cauchy", "'gauss', 'laplace'"),
        ("percentile:many", "many"),
    ],
)
def test_words_that_mean_no_range(words, message):
    with pytest.raises(InputError, match=message):
        parse_range(words)


def test_ranges_are_values_that_paste_back():
    names = {f.__name__: f for f in (MinMax, MovingAverage, Percentile, Entropy, MSE, OCTAV, ACIQ, MeanStd, Auto)}
    for make in RANGES.values():
        assert eval(repr(make()), names) == make()


def test_channels_of_a_histogram_have_their_own_bounds():
    x = normal(4, 5000) * torch.tensor([[1.0], [2], [3], [4]])
    h = Histogram(channel(0))
    h.add(x)
    for make in RANGES.values():
        _, hi = make().bounds(h, INT8.with_block(channel(0)))
        assert hi.shape == (4, 1)
        assert (hi.diff(dim=0) > 0).all()
