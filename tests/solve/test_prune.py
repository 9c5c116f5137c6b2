"""Masks: how many weights stay, which, and in what pattern."""

import pytest
import torch

from lowbit.errors import InputError, ShapeError
from lowbit.solve.prune import Pruning, cubic_sparsity, keep_largest, lamp_scores, n_of_m_mask


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn(40, 30, generator=generator),
        "small": torch.randn(8, 16, generator=generator) * 100,
        "conv": torch.randn(16, 8, 3, 3, generator=generator),
    }


def sparsity(masks: dict[str, torch.Tensor]) -> float:
    return 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.99])
def test_the_sparsity_asked_for_is_reached(scope: str, share: float) -> None:
    masks = Pruning(share, scope).masks(weights())
    assert sparsity(masks) == pytest.approx(share, abs=0.002)
    assert all(mask.any() for mask in masks.values())
    assert {name: mask.shape for name, mask in masks.items()} == {name: w.shape for name, w in weights().items()}


def test_per_layer_pruning_drops_the_smallest_weights() -> None:
    weight = torch.tensor([[3.0, -1.0, 0.5], [-4.0, 2.0, 0.1]])
    mask = Pruning(0.5, "layer").masks({"w": weight})["w"]
    assert mask.tolist() == [[True, False, False], [True, True, False]]


def test_of_equal_weights_the_first_stay() -> None:
    assert keep_largest(torch.ones(6), 2).tolist() == [True, True, False, False, False, False]


def test_lamp_scores_are_shares_of_the_energy_above() -> None:
    assert lamp_scores(torch.tensor([4.0, 2.0, 2.0]).numpy()).tolist() == [1.0, 2 / 6, 2 / 8]  # Lee et al. 2021, eq. 4


def test_global_pruning_does_not_care_how_a_layer_is_scaled() -> None:
    masks = Pruning(0.8).masks(weights())
    scaled = {name: weight * (1000 if name == "wide" else 1) for name, weight in weights().items()}
    assert all(torch.equal(mask, masks[name]) for name, mask in Pruning(0.8).masks(scaled).items())


def test_two_of_four_keeps_the_two_largest_of_every_four_inputs() -> None:
    mask = n_of_m_mask(torch.tensor([[1.0, -5.0, 2.0, 3.0, 0.0, 0.0, 0.0, -1.0]]), 2, 4)
    assert mask.tolist() == [[False, True, False, True, True, False, False, True]]
    for mask in Pruning(0.5, pattern="2:4").masks({"conv": weights()["conv"]}).values():
        assert (mask.reshape(-1, 4).sum(dim=1) == 2).all()


def test_channels_stay_or_go_as_a_whole() -> None:
    mask = Pruning(0.5, "layer", "channels").masks({"conv": weights()["conv"]})["conv"]
    assert set(mask.reshape(16, -1).sum(dim=1).tolist()) == {0, 72}
    assert mask[:, 0, 0, 0].sum() == 8


def test_blocks_stay_or_go_as_a_whole() -> None:
    mask = Pruning(0.75, "layer", "block:4x2").masks({"wide": weights()["wide"]})["wide"]
    blocks = mask.unfold(0, 4, 4).unfold(1, 2, 2).float().mean(dim=(2, 3))
    assert set(blocks.unique().tolist()) == {0.0, 1.0}
    assert mask.float().mean() == pytest.approx(0.25, abs=0.01)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ShapeError, match=r"2:4 does not fit a weight of \(40, 30\)"):
        Pruning(0.5, pattern="2:4").masks({"wide": weights()["wide"]})
    with pytest.raises(ShapeError, match="blocks of 7×1 do not fit 'wide' of 40×30"):
        Pruning(0.5, pattern="block:7x1").masks({"wide": weights()["wide"]})
    with pytest.raises(InputError, match=r"share from 0 to below 1, not 1\.5"):
        Pruning(1.5)
    with pytest.raises(InputError, match="no pattern 'diagonal'"):
        Pruning(0.5, pattern="diagonal")
    with pytest.raises(InputError, match="by layer, global, sensitivity, not by 'net'"):
        Pruning(0.5, "net")
    with pytest.raises(InputError, match="keeps everything"):
        Pruning(0.5, pattern="4:4").masks(weights())


def test_the_cubic_schedule_is_zhu_and_gupta_s() -> None:
    assert [cubic_sparsity(step, 4, 0.8) for step in range(5)] == pytest.approx(
        [0, 0.8 * (1 - 0.75**3), 0.8 * (1 - 0.5**3), 0.8 * (1 - 0.25**3), 0.8]
    )
    assert cubic_sparsity(9, 4, 0.8) == 0.8


def test_a_sensitive_layer_keeps_more_of_its_weights() -> None:
    layers = {"calm": torch.randn(40, 30), "sensitive": torch.randn(40, 30)}
    masks = Pruning(0.7, scope="sensitivity").masks(layers, sensitivity={"calm": 1.0, "sensitive": 9.0})
    kept = {name: float(mask.float().mean()) for name, mask in masks.items()}
    assert kept["sensitive"] > 2 * kept["calm"]
    assert sum(kept.values()) / 2 == pytest.approx(0.3, abs=1e-3)
    # Weights of either layer are compared by w² · sensitivity: the least kept of one is the least kept of the other.
    least = {name: float(layers[name][masks[name]].abs().min()) for name in layers}
    assert least["calm"] / least["sensitive"] == pytest.approx(3.0, rel=0.02)
