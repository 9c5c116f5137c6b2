"""What each format of each tensor costs at the outputs: errors from one set of backward passes, bytes of its codes.

`repair.sensitivity` predicts the errors of all formats at once; codes are solved as if all else were exact.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import DataError, check_name
from lowbit.flows.ptq import MEMORY, Observed, given, observed
from lowbit.graph.layer import layer_names
from lowbit.network.calibrate import solve_alone
from lowbit.network.network import Network
from lowbit.network.sites import Site
from lowbit.numerics import Format, Int, QuantTensor, parse_format, spell_format
from lowbit.numerics.grids import grid_table
from lowbit.ranges import LOSSES
from lowbit.recipe import Recipe, Rule, TensorSpec
from lowbit.repair.prove import Calibration
from lowbit.repair.ranges import choose_ranges
from lowbit.repair.sensitivity import Candidate, output_errors

# All take their bits in the file; the engine computes with int8 of them.
FORMATS = ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "lloyd2", "lloyd3", "lloyd4", "lloyd5")


@dataclass(frozen=True)
class Sensitivity:
    """What one tensor in one format, all others exact, does to the outputs.

    error   predicted error of the outputs, in the loss that was asked for
    bytes   of a weight's codes and scales; 0 for an activation
    """

    layer: str
    tensor: str
    role: str
    format: str
    error: float
    bytes: int


def sensitivity(
    model: Any,
    calibration: Any,
    recipe: "str | Path | Format | Recipe" = "w4a8-fast",
    *,
    formats: Sequence[Format | str] = FORMATS,
    loss: str = "squares",
    target: str | None = None,
    memory: int = MEMORY,
) -> list[Sensitivity]:
    """What each tensor's format costs at the outputs, predicted for all formats from one set of backward passes.

    model, calibration, target, memory   as in `quantize`
    recipe    how codes and ranges are found, and the format of the activations
    formats   of the weights; what shares a scale is as in the recipe
    loss      what the error is: "squares", squared error of the outputs relative to their power; "cross_entropy",
              Fisher information of the float network's answers; "labels", that of the class labels in the data
    return    a row for each weight in each format, and one for each activation in its own
    """
    model, data, base = given(model, calibration, recipe, target)
    prices = prices_of(observed(model, data, draft_of(base), memory), formats, loss)
    sites = prices.network.placement.sites
    rows = [
        Sensitivity(sites[name].layer, name, "weight", word, error, round(codes.bits / 8))
        for name, several in prices.weights.items()
        for word, (codes, error) in several.items()
    ]
    for name, error in prices.activations.items():
        kind = sites[name].spec.format
        assert kind is not None
        rows.append(Sensitivity(sites[name].layer, name, "activation", spell_format(kind), error, 0))
    return rows


def check_loss(loss: str, calibration: Calibration) -> None:
    """InputError where there is no such loss; DataError where it needs labels and there are none."""
    check_name("loss", loss, (*LOSSES, "labels"))
    if loss == "labels" and not calibration.single_labels:
        raise DataError("loss='labels' needs the classes of the samples, and the data has none: add an array 'labels'.")


def draft_of(recipe: Recipe) -> Recipe:
    """The recipe without what takes minutes, for prices and tries: GPTQ for AdaRound, no reconstruction."""
    passes = tuple(name for name in recipe.passes if name not in ("reconstruct", "learn_ranges"))
    return replace(solved_by(recipe, "adaround", "gptq"), passes=passes)


def solved_by(recipe: Recipe, before: str, after: str) -> Recipe:
    """The recipe with one solver in place of another."""

    def changed(rule: Rule) -> Rule:
        spec = rule.weights
        return rule if spec is None or spec.solve != before else replace(rule, weights=replace(spec, solve=after))

    return replace(recipe, rules=tuple(map(changed, recipe.rules)))


@dataclass(frozen=True)
class Prices:
    """What the tensors of a network cost at its outputs.

    loss          what errors are measured in
    weights       weight → format, as a recipe says it → its codes as if all else were exact, and their error
    activations   group → its error in its own format
    """

    network: Network
    loss: str
    weights: Mapping[str, Mapping[str, tuple[QuantTensor, float]]]
    activations: Mapping[str, float]

    def layers(self) -> dict[str, list[str]]:
        """Layer → its weights."""
        found: dict[str, list[str]] = {}
        for name in self.weights:
            found.setdefault(self.network.placement.sites[name].layer, []).append(name)
        return found


def prices_of(seen: Observed, formats: Sequence[Format | str], loss: str) -> Prices:
    """What the tensors cost: weights in each of these formats, activations in their own."""
    check_loss(loss, seen.calibration)
    network, calibration, single = seen.network, seen.calibration, seen.calibration.single
    choose_ranges(network, calibration.fitting)
    sites = {name: site for name, (site, _) in network.constants().items() if site.role == "weight"}
    tried = {name: _tried(network, site, formats) for name, site in sites.items()}
    solved = solve_alone(
        network, calibration.together, {name: list(several.values()) for name, several in tried.items()}
    )
    values = {name: [torch.as_tensor(codes.dequantize()) for codes in several] for name, several in solved.items()}
    asked: dict[str, Sequence[Candidate]] = dict.fromkeys(network.activations(), ())
    found = output_errors(network, asked | values, single, loss, calibration.single_labels)
    weights, unreached = {}, []
    for name, several in values.items():
        power = network.parameter(name).detach().square().sum()
        errors = found[name]
        if errors is None:
            unreached.append(sites[name].layer)
            errors = torch.stack([(x - network.parameter(name)).square().sum() / power for x in several]) * len(single)
        priced = zip(solved[name], (float(e) / len(single) for e in errors), strict=True)
        weights[name] = dict(zip(tried[name], priced, strict=True))
    if unreached:
        warnings.warn(
            f"no gradient reaches the weights of {', '.join(unreached)}: an operator behind them runs in onnxruntime. "
            "Their cost is taken to be their own relative squared error.",
            stacklevel=3,
        )
    activations = {n: float(e[0]) / len(single) for n in network.activations() if (e := found[n]) is not None}
    return Prices(network, loss, weights, activations)


def _tried(network: Network, site: Site, formats: Sequence[Format | str]) -> dict[str, TensorSpec]:
    """Format, as a recipe says it → the spec of this weight; those whose values the target's kernels can read."""
    own = site.spec.format
    assert own is not None
    target = network.placement.target
    most = grid_table(target.weights.grid).maximum
    asked = asked_of(network, site.layer).format
    assert asked is not None
    found = {}
    for kind in (parse_format(word) for word in formats):
        readable = isinstance(kind.grid, Int) or not target.whole
        if isinstance(own.grid, Int) and readable and grid_table(kind.grid).maximum <= most:
            word = spell_format(replace(asked, grid=kind.grid))
            found[word] = replace(site.spec, format=replace(own, grid=kind.grid))
    return found or {spell_format(asked): site.spec}


def asked_of(network: Network, layer: str) -> TensorSpec:
    """What the recipe says of a layer's weights."""
    node = next(node for node in network.program.graph if node.name == layer)
    return network.placement.recipe.specs(layer_names(node))[0]
