"""Where quantizers go: a target's roles, walked once forward and once backward over the graph.

Forward   which values come out of an integer kernel anyway (a quantized Conv and what follows it);
backward  which values an integer kernel wants to read;
then      one site for each value that either asks for, one for each weight and bias, and a reason for all that stays
          float.

A `Site` is a quantizer on one ONNX value. Sites that share a scale (through Concat, MaxPool, Reshape, …) share a group.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from lowbit.network.operators import OPERATORS
from lowbit.network.sites import Placement, Site
from lowbit.network.weights import (
    SMALLEST_WEIGHT,
    WEIGHT_AXES,
    float_constant,
    has_one_scale_an_output,
    layer_names,
    orient,
    weights_of,
)
from lowbit.numerics import TENSOR, Format, Int
from lowbit.recipe import FLOAT, Recipe, TensorSpec
from lowbit.targets import Role, Target, find_target

_COMPUTING = (Role.CONVOLVE, Role.MULTIPLY, Role.FOLLOW)  # nodes with arithmetic of their own
SENTINEL = 1e8  # attention masks write −1e9 … −3.4e38 for "never": no such constant may stretch a range


def place(program: ir.Model, recipe: Recipe) -> Placement:
    """Sites for every tensor that the recipe asks for and the target can use."""
    nodes = [node for node in program.graph if node.domain in ("", "ai.onnx")]
    recipe.check_used(layer_names(n) for n in sorted(nodes, key=lambda n: n.op_type not in WEIGHT_AXES))
    return _Placer(program, recipe, find_target(recipe.target), nodes).place()


def rules_without_layers(program: ir.Model, recipe: Recipe) -> list[str]:
    """What to tell of rules that name only nodes without weights and change nothing there, where a layer was meant."""
    named = [(node, layer_names(node)) for node in program.graph if node.domain in ("", "ai.onnx")]
    roles = find_target(recipe.target).roles
    told = []
    for rule in recipe.rules:
        found = [node for node, names in named if any(fnmatchcase(name, rule.layers) for name in names)]
        computes = any(next(weights_of(n), None) is not None or roles.get(n.op_type) in _COMPUTING for n in found)
        if not found or computes or rule.layers.startswith("op:"):
            continue
        node = found[0]
        layer = next((v.producer() for v in node.inputs if v is not None and v.producer() is not None), None)
        meant = "" if layer is None else f" Did you mean '{layer.name}' ({layer.op_type}), which is in front of it?"
        told.append(
            f"rule '{rule.layers}' names no layer, only '{node.name}' ({node.op_type}), which has no weights and no "
            f"format of its own: it does nothing.{meant}"
        )
    return told


class _Placer:
    """The three steps of `place` with what they hand on; lives for one call."""

    def __init__(self, program: ir.Model, recipe: Recipe, target: Target, nodes: list[ir.Node]) -> None:
        self.recipe, self.target, self.nodes = recipe, target, nodes
        self.graph = program.graph
        self.outputs = {v.name for v in self.graph.outputs}
        self.reasons: dict[str, str] = {}
        self.specs = {n.name: recipe.specs(layer_names(n)) for n in nodes}
        self.role = {n.name: self._role(n) for n in nodes}
        self.integral: set[str] = set()  # values that come out of an integer kernel
        self.wanted: set[str] = set()  # values that an integer kernel reads
        self.parent: dict[str, str] = {}  # union-find over values that share a scale

    def place(self) -> Placement:
        for node in self.nodes:
            self._forward(node)
        for node in reversed(self.nodes):
            self._backward(node)
        quantized = self._quantized_values()
        self._share(quantized)
        sites: dict[str, Site] = {}
        for value in self._ordered_values():
            if value.name in quantized:
                sites[str(value.name)] = self._activation_site(value)
        for node in self.nodes:
            for site in (*self._weight_sites(node), *self._constant_sites(node)):
                sites.setdefault(site.value, site)
            for site in self._bias_sites(node, sites):
                sites.setdefault(site.value, site)
        integer = frozenset(str(n.name) for n in self.nodes if self.role[n.name] in _COMPUTING)
        return Placement(sites, self.reasons, integer, self.target.engine)

    # ---- roles -------------------------------------------------------------------------------------------------

    def _role(self, node: ir.Node) -> Role | None:
        """The node's part under this target and recipe; None keeps it in float and notes why."""
        role = self.target.roles.get(node.op_type)
        if role is None or not _is_float32(node):
            return None
        weights, activations = self.specs[str(node.name)]
        if role is Role.STORE or (
            role is Role.MOVE and node.op_type == "Gather" and float_constant(node.inputs[0]) is not None
        ):
            return Role.STORE
        if role in (Role.CONVOLVE, Role.MULTIPLY):
            return self._multiplying_role(node, role, weights, activations)
        if role is Role.ABSORB and any(v is not None and v.const_value is None for v in node.inputs[1:]):
            return self._keep(node, "clips at computed bounds, which no range can absorb")
        if node.op_type == "Pad" and any(_is_sentinel(float_constant(v)) for v in node.inputs):
            return self._keep(node, "pads with a value that must not stretch a range")
        if role is Role.FOLLOW:
            if activations.format is None:
                return self._keep(node, "by rule")
            if any(_is_sentinel(float_constant(v)) for v in node.inputs):
                return self._keep(node, "a constant of an attention mask must not stretch a range")
        return role

    def _multiplying_role(self, node: ir.Node, role: Role, weights: TensorSpec, activations: TensorSpec) -> Role | None:
        constant = float_constant(node.inputs[1])
        if constant is None:
            if activations.format is None:
                return self._keep(node, "by rule")
            if not self.target.products or node.op_type not in ("MatMul", "Gemm"):
                return self._keep(node, f"multiplies two activations; target '{self.target.name}' keeps these in float")
            return role
        if weights.format is None:
            return self._keep(node, "by rule")
        if float_constant(node.inputs[0]) is not None:
            return self._keep(node, "both operands are constants")
        if node.op_type == "MatMul" and constant.ndim < 2:
            return self._keep(node, "a vector is not worth an integer kernel")
        if node.op_type == "Gemm" and (
            node.attributes.get_float("alpha", 1.0) != 1.0
            or node.attributes.get_float("beta", 1.0) != 1.0
            or node.attributes.get_int("transA")
        ):
            return self._keep(node, "Gemm with alpha, beta or transA has no integer kernel")
        if node.op_type == "Gemm" and not _has_own_bias(node):
            return self._keep(node, "Gemm without a bias of its own, one number an output (pass 'fuse_gemm' makes one)")
        if activations.format is None or _mixes(weights.format, activations.format):
            return Role.STORE
        products = constant[0].size
        if node.op_type == "Conv" and products < self.target.silu_products and _feeds_silu(node):
            self._keep(node, f"{products} products an output save less time in integers than its SiLU loses there")
            return Role.STORE
        return role

    def _keep(self, node: ir.Node, reason: str) -> Role | None:
        """Note why the node stays in float, which is no role."""
        self.reasons[str(node.name)] = reason
        return None

    # ---- which values are quantized ------------------------------------------------------------------------------

    def _forward(self, node: ir.Node) -> None:
        role = self.role[node.name]
        data = self._data_inputs(node)
        if role is Role.CONVOLVE or (
            role in (Role.FOLLOW, Role.MOVE, Role.ABSORB) and any(v.name in self.integral for v in data)
        ):
            self.integral |= {str(v.name) for v in node.outputs}

    def _backward(self, node: ir.Node) -> None:
        role = self.role[node.name]
        data = self._data_inputs(node)
        if role in (Role.CONVOLVE, Role.MULTIPLY):
            self.wanted |= {str(v.name) for v in data}
        elif role in (Role.FOLLOW, Role.MOVE):
            if not any(self._reaches_integers(v) for v in node.outputs) or not any(
                v.name in self.integral or (role is Role.MOVE and v.is_graph_input()) for v in data
            ):
                self.role[node.name] = None
            else:
                self.wanted |= {str(v.name) for v in data}
                if role is Role.FOLLOW:
                    self.wanted |= {str(self._behind_clip(node).name)}
        elif role is Role.ABSORB and not self._is_absorbed(node) and node.outputs[0].name in self.wanted:
            self.role[node.name] = None  # its input is read elsewhere: it computes between a quantized input and output

    def _reaches_integers(self, value: ir.Value) -> bool:
        """Whether an integer kernel reads this value, directly or behind the clip that absorbs it."""
        if value.name in self.wanted:
            return True
        return any(
            self.role.get(u.node.name) is Role.ABSORB
            and self._is_absorbed(u.node)
            and u.node.outputs[0].name in self.wanted
            for u in value.uses()
        )

    def _quantized_values(self) -> set[str]:
        quantized = {name for name in self.wanted if name not in self._absorbed_values()}
        for node in self.nodes:
            if self.role[node.name] is Role.CONVOLVE:
                quantized.add(str(self._behind_clip(node).name))
        return quantized

    def _absorbed_values(self) -> set[str]:
        return {
            str(n.inputs[0].name)
            for n in self.nodes
            if self.role[n.name] is Role.ABSORB and self._is_absorbed(n) and n.inputs[0]
        }

    def _is_absorbed(self, node: ir.Node) -> bool:
        """A clip whose only input comes from an integer kernel and goes nowhere else."""
        value = node.inputs[0]
        if value is None or value.name in self.outputs or len(value.uses()) != 1:
            return False
        producer = value.producer()
        return producer is not None and self.role.get(producer.name) in (Role.CONVOLVE, Role.FOLLOW, Role.MULTIPLY)

    def _behind_clip(self, node: ir.Node) -> ir.Value:
        """The node's output, or that of the clip behind it."""
        value = node.outputs[0]
        uses = value.uses()
        if len(uses) == 1 and value.name not in self.outputs:
            reader = next(iter(uses)).node
            if self.role.get(reader.name) is Role.ABSORB and self._is_absorbed(reader):
                return reader.outputs[0]
        return value

    # ---- sharing -------------------------------------------------------------------------------------------------

    def _root(self, name: str) -> str:
        while self.parent.get(name, name) != name:
            name = self.parent[name]
        return name

    def _share(self, quantized: set[str]) -> None:
        for node in self.nodes:
            if self.role[node.name] is not Role.MOVE:
                continue
            tied = [str(v.name) for v in (*self._data_inputs(node), *node.outputs) if v.name in quantized]
            for other in tied[1:]:
                self.parent[self._root(other)] = self._root(tied[0])

    # ---- sites ---------------------------------------------------------------------------------------------------

    def _ordered_values(self) -> Iterator[ir.Value]:
        yield from self.graph.inputs
        for node in self.nodes:
            yield from node.outputs

    def _activation_site(self, value: ir.Value) -> Site:
        producer = value.producer()
        integer = producer is not None and (
            self.role.get(producer.name) in (Role.CONVOLVE, Role.FOLLOW)
            or (
                self.role.get(producer.name) is Role.ABSORB
                and self._is_absorbed(producer)
                and self._from_kernel(producer)
            )
            or (self.role.get(producer.name) is Role.MOVE)
        )
        readers = None
        if not integer:
            readers = frozenset((str(u.node.name), u.idx) for u in value.uses() if self._reads_integers(u.node, u.idx))
        owner = producer if producer is not None and producer.name in self.specs else next(iter(value.uses())).node
        if integer and self.role.get(owner.name) is Role.ABSORB and (clipped := owner.inputs[0]) is not None:
            owner = clipped.producer() or owner  # the kernel in front of its clip: what a rule would name
        spec = next(s for node in self._nodes_that_ask(value) if (s := self.specs[str(node.name)][1]).format)
        if spec.format is not None and any(u.node.op_type in ("Conv", "ConvTranspose") for u in value.uses()):
            spec = replace(spec, format=spec.format.along(1))  # blocks along what is summed over: the channels
        return Site(str(value.name), "activation", spec, str(owner.name), self._root(str(value.name)), readers)

    def _nodes_that_ask(self, value: ir.Value) -> Iterator[ir.Node]:
        """Whose rules may give a quantized value its format: makers first, then readers, across clips and moves.

        A clip or a move may be float by rule: neither has arithmetic of its own. One of the nodes behind them has a
        format, because a value is quantized only where a kernel with one makes or reads it.
        """
        yield from self._makers(value)
        yield from self._takers(value)

    def _makers(self, value: ir.Value) -> Iterator[ir.Node]:
        """The node that makes a value, and those behind it across clips and moves."""
        node = value.producer()
        if node is None or node.name not in self.specs:
            return
        yield node
        if self.role[node.name] in (Role.ABSORB, Role.MOVE):
            for source in self._data_inputs(node):
                yield from self._makers(source)

    def _takers(self, value: ir.Value) -> Iterator[ir.Node]:
        """The nodes that read a value, and those behind them across clips and moves."""
        for use in value.uses():
            if use.node.name in self.specs:
                yield use.node
                if self.role[use.node.name] in (Role.ABSORB, Role.MOVE):
                    for output in use.node.outputs:
                        yield from self._takers(output)

    def _from_kernel(self, clip: ir.Node) -> bool:
        producer = clip.inputs[0].producer() if clip.inputs[0] is not None else None
        return producer is not None and self.role.get(producer.name) in (Role.CONVOLVE, Role.FOLLOW)

    def _reads_integers(self, node: ir.Node, index: int) -> bool:
        role = self.role.get(node.name)
        if role in (Role.CONVOLVE, Role.MULTIPLY, Role.FOLLOW):
            return index < 2
        return role is Role.MOVE and node.inputs[index] in self._data_inputs(node)

    def _weight_sites(self, node: ir.Node) -> Iterator[Site]:
        spec = self.specs[str(node.name)][0]
        if self.role[node.name] not in (Role.CONVOLVE, Role.MULTIPLY, Role.STORE):
            return
        for weight in weights_of(node):
            name, array = str(weight.value.name), weight.array
            if spec.format is None:
                self.reasons[name] = "by rule"
            elif self.role[node.name] is Role.STORE and array.size < SMALLEST_WEIGHT:
                self.reasons[name] = f"{array.size} values are too few to store in low bits"
            else:
                turned = replace(spec, format=orient(spec.format, weight.output_axis, weight.summed_axis, array.shape))
                yield Site(name, "weight", turned, str(node.name), name, frozenset({(str(node.name), weight.index)}))

    def _constant_sites(self, node: ir.Node) -> Iterator[Site]:
        """The constant operand of an integer Add or Mul."""
        if self.role[node.name] is not Role.FOLLOW:
            return
        for index, value in enumerate(node.inputs):
            if value is not None and float_constant(value) is not None:
                spec = self.specs[str(node.name)][1]
                yield Site(
                    str(value.name),
                    "constant",
                    spec,
                    str(node.name),
                    str(value.name),
                    frozenset({(str(node.name), index)}),
                )

    def _bias_sites(self, node: ir.Node, sites: Mapping[str, Site]) -> Iterator[Site]:
        if self.role[node.name] not in (Role.CONVOLVE, Role.MULTIPLY) or len(node.inputs) < 3:
            return
        value, data, weight = node.inputs[2], node.inputs[0], node.inputs[1]
        if value is None or data is None or weight is None or float_constant(value) is None:
            return
        if data.name not in sites or weight.name not in sites:
            return
        activations = sites[str(data.name)].spec
        if activations.dynamic or not _have_a_product_scale(node, activations.format, sites[str(weight.name)]):
            self.reasons[str(value.name)] = "no single scale belongs to the products that it is added to"
            return
        if len(value.uses()) > 1:
            self.reasons[str(value.name)] = "a bias that several layers share has no single scale"
            return
        spec = FLOAT  # int32 whatever the recipe says
        yield Site(
            str(value.name), "bias", spec, str(node.name), str(value.name), None, (str(data.name), str(weight.name))
        )

    def _data_inputs(self, node: ir.Node) -> list[ir.Value]:
        """The float inputs that are neither constants nor shapes."""
        inputs = node.inputs if node.op_type in ("Concat", "Add", "Mul") else node.inputs[:1]
        if self.role.get(node.name) is Role.MULTIPLY:
            inputs = node.inputs[:2]
        return [v for v in inputs if v is not None and float_constant(v) is None]


def _feeds_silu(node: ir.Node) -> bool:
    """Whether only x · sigmoid(x) reads what the node makes."""
    value = node.outputs[0]
    readers = {use.node.op_type: use.node for use in value.uses()}
    if readers.keys() != {"Sigmoid", "Mul"} or len(value.uses()) != 2 or value.is_graph_output():
        return False
    return readers["Sigmoid"].outputs[0] in readers["Mul"].inputs


def _mixes(weights: Format, activations: Format) -> bool:
    """Integer activations and weights of another kind have no kernel: such weights are only stored."""
    return isinstance(activations.grid, Int) and not isinstance(weights.grid, Int)


def _have_a_product_scale(node: ir.Node, activations: Format | None, site: Site) -> bool:
    """Whether every product that is summed into one output has the same scale."""
    weights = site.spec.format
    if activations is None or weights is None:
        return False
    weight = next(w for w in weights_of(node) if w.value.name == site.value)
    both_integers = isinstance(activations.grid, Int) and isinstance(weights.grid, Int)
    one = has_one_scale_an_output(weights.block, weight.array.shape, weight.output_axis)
    return both_integers and activations.block == TENSOR and one


def _has_own_bias(node: ir.Node) -> bool:
    """Whether a Gemm has no bias, or one that can be stored in int32 at the scale of its products."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    bias, weight = float_constant(value), float_constant(node.inputs[1])
    if value is None or weight is None:
        return value is None
    outputs = weight.shape[0 if node.attributes.get_int("transB") else 1]
    return bias is not None and bias.shape == (outputs,) and len(value.uses()) == 1


def _is_float32(node: ir.Node) -> bool:
    return node.outputs[0].dtype in (ir.DataType.FLOAT, None)


def _is_sentinel(array: np.ndarray | None) -> bool:
    return array is not None and array.size > 0 and bool(np.abs(array).max() >= SENTINEL)


__all__ = ["OPERATORS", "Placement", "Site", "layer_names", "orient", "place"]
