"""A plan held against real networks: each is made and measured, then the plan is made again, and the best is kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from lowbit.flows.ptq import Observed, Stage, settled
from lowbit.network.network import Network
from lowbit.recipe import Recipe
from lowbit.repair.prove import float_outputs, judging_error

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class RealNetwork:
    """A recipe, the error of its network's outputs on samples not fitted to, and what it takes of the budget."""

    recipe: Recipe
    error: float
    taken: float


@dataclass
class RealNetworks:
    """What was planned so far, as it came out.

    loss      what errors are measured in
    measure   (network, its recipe) → what it takes of the budget
    known     recipes whose network need not be made
    """

    seen: Observed
    loss: str
    measure: Callable[[Network, Recipe], float]
    stage: Stage
    known: Mapping[Recipe, RealNetwork] = field(default_factory=dict)
    made: list[RealNetwork] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.exact = float_outputs(self.seen.network, self.seen.calibration.judging)

    def make(self, recipe: Recipe) -> RealNetwork:
        """The network of a recipe, measured."""
        if recipe in self.known:
            return self.known[recipe]
        network = settled(self.seen.again(recipe), recipe).network
        error = judging_error(network, self.seen.calibration, self.exact, self.loss)
        return RealNetwork(recipe, error, self.measure(network, recipe))

    def follow(
        self,
        most: int,
        title: str,
        plan: Callable[[], tuple[Recipe, Plan] | None],
        learn: Callable[[Plan, RealNetwork], None],
    ) -> None:
        """Make what is planned, and learn from it, until a plan comes out that was made before.

        most    networks
        title   of what is tried, for `stage`
        plan    a recipe, and what `learn` wants to know of it; None where nothing can be planned
        """
        for number in range(most):
            planned = plan()
            if planned is None or any(planned[0] == known.recipe for known in self.made):
                break
            self.stage(f"{title}, {number + 1} of {most}")
            self.made.append(self.make(planned[0]))
            learn(planned[1], self.made[-1])

    def within(self, limit: float) -> list[RealNetwork]:
        """Those that keep the budget."""
        return [made for made in self.made if made.taken <= limit]
