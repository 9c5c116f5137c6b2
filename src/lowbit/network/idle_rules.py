"""Rules of a recipe that do nothing: an error where they match no layer, a warning where they match no weight."""

from collections.abc import Sequence

import onnx_ir as ir

from lowbit.errors import UnusedRuleError
from lowbit.graph.layer import LAYERS, layer_names, layers_of, state_names
from lowbit.recipe import Recipe, Rule
from lowbit.targets import COMPUTING, TARGETS, Target

MAY_BE_NONE = ("*", "at:residual")  # what presets say of any network


def idle_rules(nodes: Sequence[ir.Node], recipe: Recipe, target: Target) -> tuple[str, ...]:
    """What to tell of rules that name only nodes without weights and change nothing there, where a layer was meant.

    Raises UnusedRuleError for a rule that matches nothing, unless it speaks of what a network need not have.
    """
    told = []
    for rule in recipe.rules:
        if rule.of_states:
            _check_states(nodes, rule, target)
            continue
        found = [node for node in nodes if rule.matches(layer_names(node))]
        kind = rule.layers.removeprefix("op:")  # one recipe serves networks with and without an operator
        if not found and rule.layers not in MAY_BE_NONE and kind not in LAYERS:
            layers = [str(n.name) for n in sorted(nodes, key=lambda n: n.op_type not in LAYERS)]
            raise UnusedRuleError(
                f"rule '{rule.layers}' matched no layer. Layers are: {', '.join(layers[:8])}"
                f"{' …' if len(layers) > 8 else ''} (`lowbit show` lists them; 'op:Conv' matches an operator)."
            )
        if not found or any(computes(node, target) for node in found) or rule.layers.startswith("op:"):
            continue
        node = found[0]
        layer = next((v.producer() for v in node.inputs if v is not None and v.producer() is not None), None)
        meant = "" if layer is None else f" Did you mean '{layer.name}' ({layer.op_type}), which is in front of it?"
        told.append(
            f"rule '{rule.layers}' names no layer, only '{node.name}' ({node.op_type}), which has no weights and no "
            f"format of its own: it does nothing.{meant}"
        )
    return tuple(told)


def computes(node: ir.Node, target: Target) -> bool:
    """Whether a rule can change what becomes of this node: it has arithmetic of its own, or weights."""
    return target.kernels.get(node.op_type) in COMPUTING or any(layers_of(node))


def _check_states(nodes: Sequence[ir.Node], rule: Rule, target: Target) -> None:
    """UnusedRuleError for a rule of states that no recurrent layer of this target has."""
    if not target.states:
        raise UnusedRuleError(
            f"rule '{rule.layers}': target '{target.name}' keeps the states of recurrent layers in float. Drop it, or "
            f"simulate for a target with states in few bits: {', '.join(n for n, t in TARGETS.items() if t.states)}."
        )
    found = [state_names(node, state) for node in nodes for state in target.states.get(node.op_type, ())]
    if not any(map(rule.matches, found)):
        shown = ", ".join(names[0] for names in found[:8]) or "none, as there is no recurrent layer"
        raise UnusedRuleError(f"rule '{rule.layers}' matched no state. States are: {shown}.")
