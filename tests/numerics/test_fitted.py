"""Fitted grids: codebooks, binary bases, two slopes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as SklearnKMeans

from lowbit.errors import InputError
from lowbit.numerics import TENSOR, Bases, Format, Int, KMeans, Piecewise, channel, group, quantize
from lowbit.numerics.fitted import STARTS, fit_table
from lowbit.numerics.sorted_points import SortedPoints
from lowbit.ranges import MSE, RawRows, error


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def brute_force_inertia(values: list[float], clusters: int) -> float:
    """The least squared error of any split of sorted values into runs, every split tried by recursion."""
    values = sorted(values)

    def cost(run: list[float]) -> float:
        return sum((v - sum(run) / len(run)) ** 2 for v in run)

    def best(rest: list[float], k: int) -> float:
        if not rest:
            return 0.0
        if k == 1:
            return cost(rest)
        return min(cost(rest[:i]) + best(rest[i:], k - 1) for i in range(1, len(rest) + 1))

    return best(values, clusters)


@settings(max_examples=60)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=9), st.integers(1, 2))
def test_the_optimal_codebook_is_the_best_of_all_partitions(values, bits):
    x = torch.tensor(values, dtype=torch.float32)
    noise = float(((quantize(x, Format(KMeans(bits))).dequantize() - x) ** 2).sum())
    assert noise == pytest.approx(brute_force_inertia([float(v) for v in values], 1 << bits), abs=1e-3)


@pytest.mark.parametrize("start", STARTS)
def test_a_codebook_is_a_fixed_point_of_lloyds_steps(start):
    x = normal(20_000)
    stored = quantize(x, Format(KMeans(3, start)))
    codes, table = stored.codes, stored.table
    means = torch.stack([x[codes == c].mean() for c in range(8)])
    assert torch.allclose(means, table[0], atol=1e-5)


def test_every_start_ends_near_the_optimum_on_a_normal_sample():
    x = normal(50_000)
    db = {start: error(x, Format(KMeans(4, start))).sqnr_db for start in STARTS}
    assert max(db, key=db.get) == "optimal"
    assert db["linear"] > db["optimal"] - 0.3


def test_inertia_is_no_worse_than_scikit_learns():
    x = normal(20_000)
    peer = SklearnKMeans(16, n_init=1, random_state=0).fit(x.numpy()[:, None]).inertia_
    assert error(x, Format(KMeans(4))).mse * len(x) <= peer * 1.0001


@pytest.mark.parametrize(("bits", "mse"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_codebooks_reach_lloyd_max_on_a_normal_source(bits, mse):  # Max 1960, table I
    share = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    x = (torch.erfinv(2 * share - 1) * 2**0.5).float()
    assert error(x, Format(KMeans(bits))).mse == pytest.approx(mse, rel=3e-3)


def test_a_codebook_for_each_block_fits_each_block():
    x = torch.tensor([[1.0, 2, 1, 2], [10, 30, 10, 30]])
    stored = quantize(x, Format(KMeans(1), channel(0)))
    assert stored.table.tolist() == [[1, 2], [10, 30]]
    assert torch.equal(stored.dequantize(), x)


def test_fewer_values_than_codes_are_stored_exactly():
    x = torch.tensor([3.0, -1.0, 3.0])
    assert torch.equal(quantize(x, Format(KMeans(4))).dequantize(), x)


def test_one_base_is_the_mean_magnitude():  # Rastegari et al. 2016 (XNOR-Net), eq. 6
    x = normal(1000)
    stored = quantize(x, Format(Bases(1)))
    a = float(x.abs().mean())
    assert stored.table[0].tolist() == pytest.approx([-a, a], rel=1e-5)


@pytest.mark.parametrize(("count", "db"), [(2, 9.25), (3, 14.26), (4, 19.36)])  # Max 1960, table II: uniform
def test_bases_lie_between_the_best_uniform_grid_and_lloyd_max(count, db):
    x = normal(50_000)
    best = error(x, Format(KMeans(count))).sqnr_db
    assert db < error(x, Format(Bases(count))).sqnr_db <= best + 1e-6


def test_bases_are_sums_of_signed_factors():
    table = quantize(normal(10_000), Format(Bases(3))).table[0].double()
    a3, a2, a1 = (table[1] - table[0]) / 2, (table[2] - table[0]) / 2, (table[4] - table[0]) / 2
    sums = sorted(float(s1 * a1 + s2 * a2 + s3 * a3) for s1 in (-1, 1) for s2 in (-1, 1) for s3 in (-1, 1))
    assert np.allclose(sums, table, atol=1e-6) or torch.allclose(table, -table.flip(0), atol=1e-6)


@pytest.mark.parametrize("source", ["normal", "laplace"])
def test_breakpoint_and_end_are_the_best_of_a_fine_scan(source):
    x = normal(1, 20_000) * (1 if source == "normal" else normal(20_000, 1).T.exp())
    points, grid = SortedPoints.of_rows(x), Piecewise(4)
    top = np.abs(points.values).max(1, keepdims=True).astype(np.float64)
    ends = [top * a for a in np.geomspace(0.05, 1, 40)]
    scan = [points.squared_error(grid.table(m * p, m)).item() for p in np.linspace(0.02, 0.98, 97) for m in ends]
    assert points.squared_error(grid.fit(points)).item() <= min(scan) * 1.01


def test_two_slopes_beat_one_on_heavy_tails():  # Fang et al. 2020, figure 2: bell-shaped with long tails
    x = normal(200, 200) * normal(200, 200).roll(1).exp()
    uniform = Format(Int(4))
    one = error(x, uniform, MSE().bounds(RawRows.of(x), uniform)).sqnr_db
    assert error(x, Format(Piecewise(4))).sqnr_db > one + 1


def test_bounds_are_clipped_to_before_fitting():
    x = torch.tensor([0.0, 1.0, 100.0])
    assert quantize(x, Format(KMeans(1)), (0.0, 1.0)).dequantize().max() <= 1


def test_running_sums_give_the_error_of_a_direct_count():
    rows = normal(3, 500)
    table = np.sort(np.random.default_rng(0).normal(size=(3, 7)), axis=1)
    direct = ((rows[:, :, None].double() - torch.from_numpy(table)[:, None]) ** 2).amin(2).sum(1)
    assert np.allclose(SortedPoints.of_rows(rows).squared_error(table)[:, 0], direct)


@pytest.mark.parametrize("grid", [KMeans(4), KMeans(2, "linear"), Bases(3), Piecewise(4)], ids=repr)
@pytest.mark.parametrize("x", [torch.zeros(8), torch.full((8,), -2.0), torch.tensor([5.0]), torch.zeros(0)])
def test_degenerate_data_have_a_table_too(grid, x):
    table = fit_table(grid, x[None])
    assert torch.isfinite(table).all()
    assert (table.diff(dim=1) >= 0).all()
    assert torch.allclose(quantize(x, Format(grid)).dequantize(), x, rtol=1e-5, atol=1e-6)


def test_many_small_blocks_are_fitted_at_once():
    x = normal(64, 128)
    stored = quantize(x, Format(KMeans(2), group(16)))
    assert stored.table.shape == (64 * 8, 4)
    assert error(x, Format(KMeans(2), group(16))).sqnr_db > error(x, Format(KMeans(2), TENSOR)).sqnr_db


def test_unknown_starts_are_refused():
    with pytest.raises(InputError, match="optimal, linear"):
        KMeans(4, "forgy")
