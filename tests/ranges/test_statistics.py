"""The histogram: order and split change nothing, memory is fixed, masks and NaN are set apart."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lowbit.errors import DataError
from lowbit.numerics import TENSOR, channel
from lowbit.numerics.buckets import MASK_FROM
from lowbit.numerics.formats import INT8, UINT8
from lowbit.numerics.kernels import DEVICES, ELSEWHERE, counting
from lowbit.ranges import RANGES, Histogram, MinMax, MovingAverage, Percentile, RawRows

numbers = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, -0.0, 1.0, -1e9, 1e-45])
samples = hnp.arrays(np.float32, st.integers(1, 300), elements=numbers)


def histogram_of(*batches: np.ndarray) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    return histogram


def state(h: Histogram) -> tuple:
    values, weights = h.points()
    counts = (h.count, h.seen.masked, h.seen.nan, h.seen.infinite)
    return (*counts, float(h.minimum), float(h.maximum), values.tolist(), weights.tolist())


def test_an_interrupt_while_counting_leaves_no_counts_behind(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    x = np.arange(1, 9, dtype=np.float32)
    with monkeypatch.context() as patched:
        patched.setattr(counting, "_collect", interrupt)
        with pytest.raises(KeyboardInterrupt):
            histogram_of(x)
    values, weights = histogram_of(x).points()
    assert weights.tolist() == [[1] * 8]  # 2 each where the interrupted counts stayed
    np.testing.assert_allclose(values, [x], rtol=2e-3)


@settings(max_examples=100)
@given(samples, st.integers(0, 300), st.randoms())
def test_order_and_split_change_nothing(x, cut, random):
    shuffled = x.copy()
    random.shuffle(shuffled)
    whole = state(histogram_of(x))
    assert state(histogram_of(shuffled)) == whole
    assert state(histogram_of(x[:cut], x[cut:])) == whole
    merged = histogram_of(x[cut:])
    merged.merge(histogram_of(x[:cut]))
    assert state(merged) == whole


@settings(max_examples=100)
@given(samples)
def test_counts_are_those_of_a_direct_count(x):
    h = histogram_of(x)
    finite = x[np.isfinite(x)]
    kept = finite[np.abs(finite) < MASK_FROM]
    assert (h.count, h.seen.nan, h.seen.infinite) == (len(x), np.isnan(x).sum(), np.isinf(x).sum())
    assert h.seen.masked == len(finite) - len(kept)
    if len(kept):
        assert (float(h.minimum), float(h.maximum)) == (kept.min(), kept.max())
    values, weights = h.points()
    assert weights.sum() == len(kept)
    assert (values.diff() > 0).all()


@settings(max_examples=100)
@given(samples)
def test_torch_counts_as_the_kernel_does(x):
    rows = torch.from_numpy(x)[None]
    fast, slow = DEVICES["cpu"].count(rows), ELSEWHERE.count(rows)
    for name, value in vars(fast).items():
        assert np.array_equal(value, getattr(slow, name)), name


def test_a_point_lies_within_a_thousandth_of_its_values():
    x = np.exp(np.random.default_rng(0).normal(size=10_000) * 5).astype(np.float32)
    values, weights = histogram_of(x).points()
    repeated = np.repeat(values[0].numpy(), weights[0].numpy().astype(int))
    assert (np.abs(repeated / np.sort(x) - 1) < 1e-3).all()


def test_memory_does_not_grow_with_the_data():
    generator = torch.Generator().manual_seed(0)
    h = Histogram()
    sizes = []
    for step in range(1, 5001):
        h.add(torch.randn(100, generator=generator).clamp(-3, 3) + 0.5)
        if step in (50, 5000):
            sizes.append((h.seen.counts.nbytes, len(h.history)))
    assert sizes[1][0] <= 2 * sizes[0][0]
    assert sizes[1][1] == 1024


def test_attention_masks_enter_no_range():
    x = torch.tensor([-1.0, 0.5, -1e9, -3.4e38, 1e8])
    h = histogram_of(x)
    assert (h.seen.masked, float(h.minimum), float(h.maximum)) == (3, -1.0, 0.5)
    for make in RANGES.values():
        lo, hi = make().bounds(h, UINT8)
        assert float(lo) >= -1
        assert float(hi) <= 0.5


def test_only_masks_leave_an_empty_range():
    h = histogram_of(torch.tensor([-1e9, -1e9]))
    assert [float(b) for b in MinMax().bounds(h, INT8)] == [0, 0]


def test_nan_and_infinity_are_named_when_a_range_is_asked_for():
    h = Histogram(name="conv1_out")
    h.add(torch.tensor([1.0, float("nan"), float("inf")]))
    for make in RANGES.values():
        with pytest.raises(DataError, match=r"'conv1_out'.*1 NaN and 1 infinite value\(s\) among 3"):
            make().bounds(h, INT8)
    rows = RawRows(torch.tensor([[1.0, float("nan")]]), "fc.weight")
    for make in RANGES.values():
        with pytest.raises(DataError, match=r"'fc.weight'.*1 NaN"):
            make().bounds(rows, INT8)


def test_no_data_is_no_range():
    with pytest.raises(DataError, match="no data was observed"):
        MinMax().bounds(Histogram(), INT8)


def test_blocks_are_counted_apart():
    h = Histogram(channel(0))
    x = torch.tensor([[1.0, 2, 3], [-10, 20, 0]])
    h.add(x)
    h.add(x * 2)
    assert h.minimum.flatten().tolist() == [1, -20]
    assert h.maximum.flatten().tolist() == [6, 40]
    _, weights = h.points()
    assert weights.sum(1).tolist() == [6, 6]


def test_batches_must_have_the_same_blocks():
    h = Histogram(channel(0))
    h.add(torch.ones(2, 3))
    with pytest.raises(DataError, match="3 blocks of channel"):
        h.add(torch.ones(3, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_is_counted(dtype):
    x = torch.randn(3, 4, 5).to(dtype)
    assert state(histogram_of(x)) == state(histogram_of(x.float()))


def test_histograms_of_other_blocks_are_not_merged():
    rows, columns, wider = Histogram(channel(0), "conv_1"), Histogram(channel(1)), Histogram(channel(0))
    rows.add(torch.ones(2, 3))
    columns.add(torch.ones(2, 3))
    wider.add(torch.ones(3, 3))
    with pytest.raises(DataError, match=r"'conv_1' of different blocks, channel\(0\) and channel\(1\)"):
        rows.merge(columns)
    with pytest.raises(DataError, match="'conv_1' differ in shape: 3 blocks of channel"):
        rows.merge(wider)
    assert rows.count == 6


def test_the_moving_average_follows_the_batches():  # 0.9 · 1 + 0.1 · 3 = 1.2, then 0.9 · 1.2 + 0.1 · 3 = 1.38
    h = histogram_of(*(torch.tensor([0.0, top]) for top in (1.0, 3.0, 3.0)))
    assert float(MovingAverage(0.9).bounds(h, UINT8)[1]) == pytest.approx(1.38)


def test_raw_rows_are_points_of_weight_one():
    values, weights = RawRows(torch.tensor([[3.0, 1.0], [2.0, 2.0]])).points()
    assert values.tolist() == [[1, 3], [2, 2]]
    assert weights.tolist() == [[1, 1], [1, 1]]


def test_a_percentile_of_a_small_sample_by_hand():
    x = torch.arange(1, 101, dtype=torch.float32)
    assert [float(b) for b in Percentile(99).bounds(RawRows.of(x), INT8)] == [2, 99]
    assert [float(b) for b in Percentile(100).bounds(RawRows.of(x), INT8)] == [1, 100]
    assert TENSOR.tile((100,)) == (100,)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_batches_that_were_dealt_to_several_give_the_ranges_of_one(count: int) -> None:
    batches = [np.random.default_rng(i).normal(size=50).astype(np.float32) * (i + 1) for i in range(4)]
    shards = [Histogram() for _ in range(count)]
    for number, batch in enumerate(batches):
        shards[number % count].time = number
        shards[number % count].add(batch)  # one of five has nothing
    dealt, one = Histogram.dealt(shards), histogram_of(*batches)
    assert state(dealt) == state(one)
    assert [float(low[0]) for _, low, _ in dealt.history] == [float(batch.min()) for batch in batches]
    for kind in (MinMax(), MovingAverage(), Percentile(99)):
        assert kind.bounds(dealt, UINT8) == kind.bounds(one, UINT8)
