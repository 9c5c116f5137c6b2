"""Which layers get a wider format, so that only a share of the predicted error stays: the fewest and the smallest.

Fewer bits than the target's own formats become these. Where all tensors have them, a layer computes in float: its
activations lose their quantizers and its weights stay stored in integers, unless it is the weights that cost.
An integer program chooses (`solve.program`); what an error costs at the outputs is estimated (`repair.sensitivity`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import onnx_ir as ir

from lowbit.network.idle_rules import computes
from lowbit.network.network import Network
from lowbit.network.sites import Placement, Site
from lowbit.recipe import FLOAT, Recipe, Rule, TensorSpec
from lowbit.solve.program import Amounts, Between, Option, Program
from lowbit.targets import Role, Target

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
    recipe, target, sites = network.placement.recipe, network.placement.target, network.placement.sites
    few = {name for name in costs if _has_few_bits(sites[name], target)}
    counted = {name: cost for name, cost in costs.items() if name in few or not few}
    # Weights in float need activations in float.
    choices = ((False, False), (False, True), (True, False), (True, True))
    asked = _least(network, counted, share, bytes_weigh, choices if few else (*choices[:2], choices[3]))
    rules = list(_rules(network, asked, bool(few)))
    words = f"{len(rules)} layer{'s' * (len(rules) != 1)} in "
    if few:
        words += f"{target.weights.grid.bits} bits"
    elif (whole := sum(rule.weights is not None for rule in rules)) and whole < len(rules):
        words += f"float, the weights of {whole} too"
    else:
        words += "float" if whole else "float but for their weights"
    return replace(recipe, rules=(*recipe.rules, *rules)), words


def fewest_in_float(network: Network, costs: Mapping[str, float], share: float) -> list[str]:
    """The fewest layers that, wholly in float, leave at most this share of the error; costs as in `wider`.

    return   names; none where nothing is to be gained. `recipe.keep_float(*map(literal, names))` leaves them in float
    """
    asked = _least(network, costs, share, 1.0, ((False, False), (True, True)))
    return [layer for layer, chosen in asked.items() if any(chosen)]


Wider = tuple[bool, bool]  # whether a layer's weights get a wider format, and whether its activations do


def choices_of(
    network: Network,
    costs: Mapping[str, float],
    choices: Sequence[Wider],
    taken: Callable[[str, Wider], Amounts],
) -> tuple[Program, dict[str, list[Wider]]]:
    """The integer program of these choices for each layer, and each layer's choices in its order.

    costs    quantizer → the "error" that it adds while it stays as it is
    taken    what a choice takes beside that, for a layer
    """
    weights = {network.placement.sites[name].layer: name for name in costs if _is_weight(network, name)}
    beside = layers_beside(network, costs)

    def option(layer: str, chosen: Wider) -> Option:
        error = {"error": costs[weights[layer]]} if layer in weights and not chosen[0] else {}
        return Option({**taken(layer, chosen), **error}, in_float=chosen[1])

    several = {  # a layer without weights: the choices of its activations
        layer: list(dict.fromkeys((of_weights and layer in weights, too) for of_weights, too in choices))
        for layer in dict.fromkeys(chain(*beside.values()))
    }
    options = {layer: [option(layer, chosen) for chosen in found] for layer, found in several.items()}
    values = [Between({"error": costs[n]}, layers) for n, layers in beside.items() if not _is_weight(network, n)]
    return Program(options, values), several


def layers_beside(network: Network, costs: Iterable[str]) -> dict[str, Sequence[str]]:
    """Quantizer → the layers that keep it while one of them is in integers."""
    return {name: _layers_at(network, name) for name in costs}


def _least(
    network: Network, costs: Mapping[str, float], share: float, bytes_weigh: float, choices: Sequence[Wider]
) -> dict[str, Wider]:
    """Layer → what of it gets a wider format, so that the sum of losses is least."""
    sites = network.placement.sites
    sizes = {sites[name].layer: network.parameter(name).numel() for name in costs if _is_weight(network, name)}
    count, total = len(set(chain(*layers_beside(network, costs).values()))), sum(sizes.values()) or 1

    def loss(layer: str, chosen: Wider) -> Amounts:
        return {"loss": chosen[1] / count + bytes_weigh * chosen[0] * sizes.get(layer, 0) / total}

    program, several = choices_of(network, costs, choices, loss)
    best = program.least("loss", {"error": share * sum(costs.values())}) or {}
    return {layer: several[layer][index] for layer, index in best.items()}


def _is_weight(network: Network, name: str) -> bool:
    return network.placement.sites[name].role == "weight"


def literal(name: str) -> str:
    """A glob that matches this name only."""
    return "".join(f"[{c}]" if c in "[*?" else c for c in name)


def _rules(network: Network, asked: Mapping[str, Wider], few: bool) -> Iterator[Rule]:
    target = network.placement.target
    solve = {site.layer: site.spec.solve for site in network.placement.sites.values() if site.role == "weight"}
    for layer, (of_weights, of_activations) in asked.items():
        own: TensorSpec | None = None
        if of_weights:
            own = TensorSpec(target.weights, "minmax", solve[layer]) if few else FLOAT
        if of_weights or of_activations:
            activations = TensorSpec(target.activations, "auto") if few else FLOAT
            yield Rule(literal(layer), own, activations if of_activations else None)


def _layers_at(network: Network, name: str) -> Sequence[str]:
    """Layers that keep a value, or a constant operand, quantized while one of them is in integers."""
    site = network.placement.sites[name]
    if site.role != "activation":
        return [site.layer]
    return layers_around(network.program, network.placement, name)


def layers_around(program: ir.Model, placement: Placement, name: str) -> list[str]:
    """Layers that would quantize this value (or any that shares its scale) again if they stayed in integers.

    Where a clip makes the value, what computes before it is one of them: a kernel does both at once.
    """
    values = {s.value for s in placement.sites.values() if name in (s.value, s.group)}
    target = placement.target
    found: dict[str, None] = {}
    for node in program.graph:
        if any(v is not None and v.name in values for v in (*node.inputs, *node.outputs)):
            before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
            makes = any(v.name in values for v in node.outputs)
            if makes and before is not None and target.kernels.get(node.op_type) is Role.ABSORB:
                found[str(before.name)] = None
            found[str(node.name)] = None
    in_float = placement.float_reasons  # already, as the Sigmoid and the Mul of a SiLU
    return [str(n.name) for n in program.graph if n.name in found and n.name not in in_float and computes(n, target)]


def _has_few_bits(site: Site, target: Target) -> bool:
    """Whether its format has fewer bits than the target's own."""
    own = target.weights if site.role == "weight" else target.activations
    return site.spec.format is not None and site.spec.format.grid.bits < own.grid.bits
