"""Files of recipes for one network and its calibration data, which is read once for each set of passes."""

from dataclasses import dataclass, field, replace

from lowbit.data import Data
from lowbit.errors import DataError
from lowbit.flows.ptq import Observed, Stage, observed, settled, written
from lowbit.model import Model
from lowbit.numerics.noise import decibels
from lowbit.recipe import Recipe, Rule
from lowbit.repair.prove import float_outputs, output_error
from lowbit.repair.steps import STEPS
from lowbit.targets import find_target


@dataclass
class Bench:
    """A network and its calibration data.

    recipe   what was asked for, and what to call it
    told     hears what goes on
    title    what is tried now, for `told`
    """

    model: Model
    data: Data
    recipe: Recipe
    name: str
    memory: int
    told: Stage
    title: str = ""
    _observed: dict[Recipe, Observed] = field(default_factory=dict)

    def stage(self, phase: str) -> None:
        """Another phase of what is tried begins."""
        self.told(f"{self.title}: {phase}" if self.title else phase)

    def make(self, recipe: Recipe) -> tuple[Model, float]:
        """The recipe's file, and the signal-to-noise ratio of its outputs in dB on samples kept for judging."""
        ready = self.settled(recipe)
        judging = ready.calibration.judging
        exact = float_outputs(self.observed(recipe).network, judging)
        error = output_error(ready.network, judging, exact)
        return written(ready, self.stage), decibels(max(error, 1e-30))

    def settled(self, recipe: Recipe) -> Observed:
        """The network with the recipe's scales and codes."""
        return settled(self.observed(recipe).again(recipe), recipe)

    def observed(self, recipe: Recipe) -> Observed:
        """The network after the recipe's passes and pruning, with what its activations have observed.

        All of them observe where any does: what a recipe gets does not depend on which were tried before it.
        """
        recipe.check_deployable()
        passes = tuple(name for name in recipe.passes if name not in STEPS)
        quantized = any(rule.activations is not None and rule.activations.format for rule in recipe.rules)
        own = find_target(recipe.target)
        rules = [Rule("*", own.weights, own.activations if quantized else None)]
        rules += [Rule(rule.layers, prune=rule.prune) for rule in recipe.rules if rule.prune is not None]
        every = replace(recipe, rules=tuple(rules), passes=passes)
        if every not in self._observed:
            self.stage("calibrating")
            self._observed[every] = observed(self.model, self.data, every, self.memory, self.stage)
        return self._observed[every]


def read_again(name: str, data: Data) -> Data:
    """Data that can be read several times; DataError where it cannot."""
    if not data.source.repeatable:
        raise DataError(
            f"the {name} data is a generator, and a search reads it more than once: give the function that makes it, a "
            "list, arrays or a file."
        )
    return data
