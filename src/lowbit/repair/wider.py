"""Which layers get a wider format, so that only a share of the predicted error stays: the fewest and the smallest.

Fewer bits than the target's own formats become these. Where all tensors have them, a layer computes in float: its
activations lose their quantizers and its weights stay stored in integers, unless it is the weights that cost.
An integer program chooses (`solve.program`); what an error costs at the outputs is estimated (`repair.sensitivity`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from lowbit.network.network import Network
from lowbit.network.sites import Site
from lowbit.recipe import FLOAT, Recipe, Rule, TensorSpec
from lowbit.repair.leave_in_float import layers_around, literal
from lowbit.solve.program import Between, Option, Program
from lowbit.targets import Target, find_target

# A file may be 15 % larger than plain int8 where 5 % of its weights are float: they count like all layers in float.
BYTES_WEIGH = 20.0


def wider(
    network: Network, costs: Mapping[str, float], share: float, bytes_weigh: float = BYTES_WEIGH
) -> tuple[Recipe, str]:
    """The network's recipe with rules for some layers, and these in words.

    costs   quantizer → the error that it adds, of `quantizer_costs`; only those of few bits count while there are any
    share   of the error that may stay
    bytes_weigh   how much more the weights' share of all bytes counts than the layers' share of all layers
    """
    recipe = network.placement.recipe
    assert recipe is not None
    target, sites = find_target(recipe.target), network.placement.sites
    few = {name for name in costs if _has_few_bits(sites[name], target)}
    counted = {name: cost for name, cost in costs.items() if name in few or not few}
    weights = {sites[name].layer: name for name in counted if sites[name].role == "weight"}
    values = {name: _layers_at(network, name, target) for name in counted if name not in weights.values()}
    layers = dict.fromkeys((*weights, *(layer for beside in values.values() for layer in beside)))
    total = sum(network.parameter(name).numel() for name in weights.values()) or 1

    def options(layer: str) -> Iterator[tuple[tuple[bool, bool], Option]]:
        """((weights, activations) get a wider format, what that takes); float weights need float activations."""
        for chosen in ((False, False), (False, True), (True, False), (True, True)):
            if chosen[0] and (layer not in weights or not (few or chosen[1])):
                continue
            name = weights.get(layer)
            amounts = {"loss": chosen[1] / len(layers)}
            if name is not None and chosen[0]:
                amounts["loss"] += bytes_weigh * network.parameter(name).numel() / total
            elif name is not None:
                amounts["error"] = counted[name]
            yield chosen, Option(amounts, in_float=chosen[1])

    several = {layer: list(options(layer)) for layer in layers}
    program = Program(
        {layer: [option for _, option in found] for layer, found in several.items()},
        [Between({"error": counted[name]}, beside) for name, beside in values.items()],
    )
    best = program.least("loss", {"error": share * sum(counted.values())}) or {}
    asked = {layer: several[layer][index][0] for layer, index in best.items()}
    rules = list(_rules(recipe, sites, weights, asked, target, bool(few)))
    words = f"{len(rules)} layer{'s' * (len(rules) != 1)} in "
    if few:
        words += f"{target.weights.grid.bits} bits"
    elif (whole := sum(rule.weights is not None for rule in rules)) and whole < len(rules):
        words += f"float, the weights of {whole} too"
    else:
        words += "float" if whole else "float but for their weights"
    return replace(recipe, rules=(*recipe.rules, *rules)), words


def _rules(
    recipe: Recipe, sites: Mapping[str, Site], weights: Mapping[str, str], asked: Mapping[str, tuple[bool, bool]],
    target: Target, few: bool,
) -> Iterator[Rule]:  # fmt: skip
    for layer, (of_weights, of_activations) in asked.items():
        own: TensorSpec | None = None
        if of_weights:
            own = TensorSpec(target.weights, "minmax", sites[weights[layer]].spec.solve) if few else FLOAT
        if of_weights or of_activations:
            activations = TensorSpec(target.activations, "auto") if few else FLOAT
            yield Rule(literal(layer), own, activations if of_activations else None)


def _layers_at(network: Network, name: str, target: Target) -> Sequence[str]:
    """Layers that keep a value, or a constant operand, quantized while one of them is in integers."""
    site = network.placement.sites[name]
    return [site.layer] if site.role == "constant" else layers_around(network.program, network.placement, name, target)


def _has_few_bits(site: Site, target: Target) -> bool:
    """Whether its format has fewer bits than the target's own."""
    own = target.weights if site.role == "weight" else target.activations
    return site.spec.format is not None and site.spec.format.grid.bits < own.grid.bits
