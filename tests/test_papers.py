"""One named formula or table entry for each method, its tolerance stated."""

import math

import numpy as np
import pytest
import torch

from lowbit.numerics import Format, Int, KMeans, parse_format, quantize, scale_and_zero
from lowbit.numerics.fitted import Piecewise
from lowbit.numerics.formats import FORMATS, INT8
from lowbit.numerics.sorted_points import SortedPoints
from lowbit.ranges import ACIQ, MSE, OCTAV, RawRows, error
from lowbit.ranges.analytic import gauss_clip, laplace_clip


def gauss(n: int) -> torch.Tensor:
    """Quantiles of the standard normal distribution: a sample without chance."""
    share = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return (torch.erfinv(2 * share - 1) * math.sqrt(2)).float()


@pytest.mark.parametrize(("bits", "clip"), zip(range(2, 9), (2.83, 3.89, 5.03, 6.20, 7.41, 8.65, 9.90), strict=True))
def test_aciq_laplace(bits, clip):  # Banner et al. 2019, section 4.1; printed to two digits
    assert laplace_clip(bits) == pytest.approx(clip, abs=0.01)


@pytest.mark.parametrize(("bits", "clip"), zip(range(2, 9), (1.71, 2.15, 2.56, 2.94, 3.29, 3.62, 3.92), strict=True))
def test_aciq_gauss(bits, clip):  # Banner et al. 2019, section 4.2; printed to two digits
    assert gauss_clip(bits) == pytest.approx(clip, abs=0.006)


def test_aciq_is_found_on_a_sample():
    assert float(ACIQ("gauss").bounds(RawRows.of(gauss(100_000)), Format(Int(4)))[1]) == pytest.approx(2.56, abs=0.01)


def test_octav_is_a_fixed_point_of_equation_6():  # Sakr et al. 2022
    x, bits = gauss(50_000), 4
    s = float(OCTAV(steps=50).bounds(RawRows.of(x), Format(Int(bits)))[1])
    above = x.abs() > s
    right = float(x.abs()[above].sum() / (4.0**-bits / 3 * (~above).sum() + above.sum()))
    assert s == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "bits"),
    [("vsq4", 4.25), ("mx4", 4), ("mx6", 6), ("mx9", 9), ("mxfp4", 4.25), ("mxint8", 8.25), ("nvfp4", 4.5)],
)
def test_effective_bits(words, bits):  # Dai 2021; Darvish Rouhani 2023, table 1; OCP MX 1.0; NVFP4
    assert parse_format(words).bits_per_element() == bits


def test_the_affine_step():  # α = -32, β = 32, b = 4: S = 64 / 15
    scale, zero = scale_and_zero(torch.tensor([[-32.0]]), torch.tensor([[32.0]]), FORMATS["uint4"])
    assert float(scale) == pytest.approx(64 / 15)
    assert round(float(scale), 2) == 4.27
    assert float(zero) in (7, 8)


@pytest.mark.parametrize(("levels_bits", "mse"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_of_a_normal_source(levels_bits, mse):  # Max 1960, table I
    assert error(gauss(200_000), Format(KMeans(levels_bits))).mse == pytest.approx(mse, rel=3e-3)


@pytest.mark.parametrize(("bits", "step", "mse"), [(2, 0.9957, 0.1188), (3, 0.5860, 0.03744), (4, 0.3352, 0.01154)])
def test_the_best_uniform_step_of_a_normal_source(bits, step, mse):  # Max 1960, table II: levels at odd half steps
    x = gauss(100_000)
    codes = (x / step - 0.5).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    direct = float(((codes + 0.5) * step - x).pow(2).mean())
    assert direct == pytest.approx(mse, rel=3e-3)
    # Our integers hold 0 instead of standing at half steps; at 3 and 4 bits that costs under 5 %.
    kind = Format(Int(bits))
    ours = error(x, kind, MSE().bounds(RawRows.of(x), kind)).mse
    assert ours <= mse * (1.55 if bits == 2 else 1.12)


def test_uniform_rounding_noise():  # Bennett 1948: Δ² / 12 for a uniform source
    x = torch.linspace(-1, 1, 1_000_001)
    step = float(quantize(x, INT8).scale_values())
    assert error(x, INT8).mse == pytest.approx(step**2 / 12, rel=1e-3)


def test_six_decibels_a_bit():
    x = torch.linspace(-1, 1, 100_001)
    gain = [error(x, Format(Int(b + 1))).sqnr_db - error(x, Format(Int(b))).sqnr_db for b in range(8, 12)]
    assert gain == pytest.approx([6.02] * 4, abs=0.1)


def test_nf4_holds_quantiles_of_the_normal_distribution():  # Dettmers et al. 2023, appendix E
    values = FORMATS["nf4"].grid.values()
    offset = 0.9677083

    def quantile(p: float) -> float:
        return float(torch.erfinv(torch.tensor(2 * p - 1, dtype=torch.float64))) * math.sqrt(2)

    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.array(sorted([*negative, 0.0, *positive])) / max(positive)
    assert np.allclose(values, expected, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 6])
def test_pwlq_breakpoint_of_a_normal_source(bits):  # Fang et al. 2020, eq. 8: p/m grows as ln(0.8614 m + 0.6079) / m
    """The paper's closed form holds for many levels and m = max |x|; the fitted pair comes near its error or below."""
    x = gauss(100_000)
    points, grid = SortedPoints.of_rows(x[None]), Piecewise(bits)
    m = np.array([[float(x.max())]])
    p = np.log(0.8614 * m + 0.6079)
    assert points.squared_error(grid.fit(points)).item() <= points.squared_error(grid.table(p, m)).item() * 1.001


def test_vs_quant_pays_a_quarter_bit_for_its_gain():  # Dai et al. 2021, section 5: 4.25 bits against 4 per channel
    x = gauss(64 * 256)[torch.randperm(64 * 256, generator=torch.Generator().manual_seed(0))].reshape(64, 256)
    gain = error(x, "vsq4").sqnr_db - error(x, "int4 narrow channel:0").sqnr_db
    assert gain > 3


def test_mx6_and_mx9_differ_by_three_bits():  # 6.02 dB a bit
    x = gauss(1 << 14)[torch.randperm(1 << 14, generator=torch.Generator().manual_seed(0))]
    assert error(x, "mx9").sqnr_db - error(x, "mx6").sqnr_db == pytest.approx(3 * 6.02, abs=0.5)
