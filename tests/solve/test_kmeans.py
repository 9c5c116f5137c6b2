"""Weight sharing: codes, tables, and a zero that stays zero."""

import pytest
import torch

from lowbit.errors import InputError
from lowbit.numerics import TENSOR, WHOLE, Format, KMeans, QuantTensor, tile
from lowbit.recipe import TensorSpec
from lowbit.solve import SOLVERS
from lowbit.solve.kmeans import kmeans, refit


def weight() -> torch.Tensor:
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * 0.05


def share(
    weight: torch.Tensor,
    mask: torch.Tensor | None,
    bits: int,
    groups: int = 1,
    start: str = "linear",
    multiplier: float = 0.0,
) -> QuantTensor:
    block = TENSOR if groups == 1 else tile({-2: len(weight) // groups, -1: WHOLE})
    return kmeans(weight, Format(KMeans(bits, start, multiplier), block), mask)


def entropy(codes: torch.Tensor) -> float:
    p = torch.bincount(codes.reshape(-1).long()).double() / codes.numel()
    return float(-(p[p > 0] * p[p > 0].log2()).sum())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_pruned_weight_stays_zero_and_the_rest_gets_the_other_codes(bits: int) -> None:
    mask = weight().abs() > 0.05
    shared = share(weight(), mask, bits)
    dense = shared.dequantize()
    assert (dense[~mask] == 0).all()
    assert (dense[mask] != 0).all()
    assert shared.table.shape[1] <= 2**bits
    assert len(dense.unique()) <= 2**bits


def test_every_weight_gets_its_nearest_value_and_every_value_is_the_mean_of_its_weights() -> None:
    shared = share(weight(), None, 3, start="optimal")
    table = shared.table[0]
    nearest = (weight().reshape(-1, 1) - table).abs().argmin(dim=1)
    assert torch.equal(nearest, shared.codes.reshape(-1).long())
    for code in range(8):
        assert table[code] == pytest.approx(float(weight()[shared.codes == code].mean()), abs=1e-7)


def test_few_different_weights_are_kept_exactly() -> None:
    exact = torch.tensor([0.5, -1.25, 0.0, 3.0]).repeat(10).reshape(8, 5)
    assert torch.equal(share(exact, None, 2).dequantize(), exact)
    assert torch.equal(share(exact, exact != 0, 2).dequantize(), exact)


def test_tables_of_groups_fit_rows_of_other_scales() -> None:
    scaled = weight() * torch.tensor([1.0, 10.0, 0.1, 3.0]).repeat_interleave(8).reshape(-1, 1)
    one, four = (share(scaled, None, 3, groups=g).dequantize() for g in (1, 4))
    assert (four - scaled)[16:24].square().mean() < 0.1 * (one - scaled)[16:24].square().mean()
    assert share(scaled, None, 3, groups=5).table.shape == (6, 8)  # of 6 rows each, the last of 2


def test_a_price_on_bits_buys_fewer_of_them_at_the_same_error() -> None:
    plain, priced = share(weight(), None, 3, start="optimal"), share(weight(), None, 4, multiplier=0.06)
    assert entropy(priced.codes) < entropy(plain.codes) - 0.15  # measured 2.63 and 2.82 bits
    assert (priced.dequantize() - weight()).square().mean() < (plain.dequantize() - weight()).square().mean()


def test_a_layer_pruned_to_nothing_is_all_zero() -> None:
    shared = share(weight(), torch.zeros(32, 64, dtype=torch.bool), 4)
    assert shared.table.shape == (1, 1)
    assert not shared.dequantize().any()


def test_wrong_widths_are_refused() -> None:
    with pytest.raises(InputError, match="bits must be 1 to 8"):
        share(weight(), None, 9)


def test_a_recipe_can_ask_for_k_means_by_name() -> None:
    found = SOLVERS["kmeans"](weight(), TensorSpec("codebook3:linear"), None)
    assert torch.equal(found.dequantize(), share(weight(), None, 3).dequantize())
    with pytest.raises(InputError, match="k-means finds the values of a codebook"):
        SOLVERS["kmeans"](weight(), TensorSpec("int8"), None)


def test_values_move_to_the_means_of_their_weights_and_0_stays() -> None:
    mask = weight().abs() > 0.05
    moved = refit(share(weight(), mask, 3), 2 * weight())
    table = moved.table[0]
    assert 0 in table
    for code, value in enumerate(table):
        wanted = float((2 * weight())[moved.codes == code].mean()) if value else 0.0
        assert float(value) == pytest.approx(wanted, abs=1e-6)
