"""Rounding with feedback: against the paper's update written out, closed forms, and what it is for."""

import pytest
import torch
from torch import Tensor

from lowbit.solve.gptq import Feedback, feed_back

STEP = 0.25


def nearest(column: Tensor, _: Tensor | None = None) -> Tensor:
    return torch.round(column / STEP) * STEP


def correlated(inputs: int, samples: int = 4000) -> Tensor:
    """Neighbours share most of what they are, as pixels do."""
    noise = torch.randn(samples, inputs + 4, generator=torch.Generator().manual_seed(1))
    return noise.unfold(1, 5, 1).mean(-1) + 0.3


def weights(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(2))


def by_the_book(rows: Tensor, hessian: Tensor, order: Tensor) -> Tensor:
    """Frantar et al. 2022, eq. 2 and 3: round one input, spread its error by H⁻¹, take the input out of H⁻¹."""
    w, inverse, left = rows.double().clone(), torch.linalg.inv(hessian.double()), list(range(len(hessian)))
    rounded = torch.zeros_like(w)
    for q in order.tolist():
        at = left.index(q)
        rounded[:, q] = nearest(w[:, q])
        w[:, left] -= torch.outer((w[:, q] - rounded[:, q]) / inverse[at, at], inverse[at])
        inverse = inverse - torch.outer(inverse[:, at], inverse[at]) / inverse[at, at]
        keep = [i for i in range(len(left)) if i != at]
        inverse, left = inverse[keep][:, keep], [left[i] for i in keep]
    return rounded


@pytest.mark.parametrize("inputs", [1, 5, 64, 150])  # 150: more than two parts
def test_it_is_the_papers_update(inputs: int) -> None:
    x, rows = correlated(inputs), weights(7, inputs)
    feedback = Feedback.of(x.T @ x, damping=0.01)
    moments = (x.T @ x).double()
    hessian = moments + 0.01 * moments.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    assert torch.equal(nearest(feed_back(rows, feedback, nearest)), by_the_book(rows, hessian, feedback.order))


def test_independent_inputs_of_one_power_are_rounded_to_nearest() -> None:
    feedback = Feedback.of(3.0 * torch.eye(8))
    assert feedback.gain == pytest.approx(1.0)
    rows = weights(5, 8)
    assert torch.equal(feed_back(rows, feedback, nearest), rows.double())


def test_correlated_inputs_lose_less_than_rounding_alone() -> None:
    x, rows = correlated(64), weights(32, 64)
    feedback = Feedback.of(x.T @ x)
    error = {
        name: float((x.double() @ (rounded.double() - rows.double()).T).square().mean())
        for name, rounded in (("fed", nearest(feed_back(rows, feedback, nearest))), ("alone", nearest(rows)))
    }
    assert error["fed"] < 0.3 * error["alone"]  # measured 0.18


def test_the_gain_says_how_much_error_feedback_leaves() -> None:
    x, rows = correlated(32), weights(4000, 32)
    moments = (x.T @ x).double() / len(x)
    feedback = Feedback.of(moments, damping=0.0)
    delta = nearest(feed_back(rows, feedback, nearest)) - rows.double()
    left = float(torch.einsum("oi,ij,oj->", delta, moments, delta) / len(rows))
    alone = STEP**2 / 12 * float(moments.diagonal().sum())
    assert left / alone == pytest.approx(feedback.gain, rel=0.05)


def test_inputs_that_are_always_zero_are_rounded_alone() -> None:
    x = correlated(6)
    x[:, 2] = 0
    rows = weights(3, 6)
    rounded = nearest(feed_back(rows, Feedback.of(x.T @ x), nearest))
    assert torch.equal(rounded[:, 2], nearest(rows[:, 2]).double())
    nothing = feed_back(rows, Feedback.of(torch.zeros(6, 6)), nearest)
    assert torch.equal(nothing, rows.double())


def test_inputs_that_carry_errors_are_made_up_for() -> None:
    x, rows = correlated(24), weights(16, 24)
    rough = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) + 0.1 * x.roll(1, 1)
    exact = x.double() @ rows.double().T

    def error(cross: Tensor | None) -> float:
        found = nearest(feed_back(rows, Feedback.of(rough.T @ rough, cross), nearest))
        return float((rough.double() @ found.T - exact).square().mean())

    assert error(x.T @ rough) < 0.6 * error(None)  # measured 0.46
