"""Where quantizers go: a target's kernels, walked once forward and once backward over the graph.

Forward   which values come out of an integer kernel anyway (a quantized Conv and what follows it);
backward  which values an integer kernel wants to read;
then      one site for each value that either asks for, one for each weight and bias, and a reason for all that stays
          float.

A `Site` is a quantizer on one ONNX value. Sites that share a scale (through Concat, MaxPool, Reshape, …) share a group.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import onnx_ir as ir

from lowbit.errors import UnsupportedError
from lowbit.graph.layer import MULTIPLYING, OVER_POSITIONS, RECURRENT, layer_names, layers_of, state_names
from lowbit.graph.weights import float_constant
from lowbit.network import why_float
from lowbit.network.idle_rules import idle_rules
from lowbit.network.operators import shares_scale
from lowbit.network.sites import Placement, Site
from lowbit.network.weights import orient
from lowbit.numerics import Int
from lowbit.numerics.grids import is_whole
from lowbit.recipe import FLOAT, Recipe, TensorSpec
from lowbit.targets import COMPUTING, Role, Target, find_target

_FLOATS = (ir.DataType.FLOAT, None)


def place(program: ir.Model, recipe: Recipe) -> Placement:
    """Sites for every tensor that the recipe asks for and the target can use."""
    nodes = [node for node in program.graph if node.domain in ("", "ai.onnx")]
    target = find_target(recipe.target)
    idle = idle_rules(nodes, recipe, target)
    placer = _Placer(program.graph, recipe, target, nodes)
    sites = placer.sites()
    if target.whole and (floats := placer.in_float(sites)):
        raise UnsupportedError(
            f"target '{target.name}' computes everything in integers, and these have no integer form or stay in float "
            f"by a rule: {', '.join(floats)}. Leave them out of the network, drop the rule, or choose another target."
        )
    integer = frozenset(name for name, role in placer.role.items() if role in COMPUTING)
    return Placement(sites, placer.reasons, integer, idle, recipe, _states(nodes, recipe, target, integer))


def _states(
    nodes: list[ir.Node], recipe: Recipe, target: Target, integer: frozenset[str]
) -> dict[str, dict[str, TensorSpec]]:
    """What the states of recurrent layers in integers are rounded to, where the target stores them in few bits."""
    return {
        str(n.name): {s: recipe.state(state_names(n, s), kind) for s, kind in target.states[n.op_type].items()}
        for n in nodes
        if n.op_type in target.states and n.name in integer
    }


class _Placer:
    """The steps of `place` with what they hand on; lives for one call.

    role       node name → its part; None: it computes in float
    integral   values that come out of an integer kernel
    wanted     values that an integer kernel reads
    group      value → the value whose name stands for all that share its scale
    settled    values that the shapes of inputs decide, as the zeros that a recurrent layer starts from
    """

    def __init__(self, graph: ir.Graph, recipe: Recipe, target: Target, nodes: list[ir.Node]) -> None:
        self.graph, self.target, self.nodes = graph, target, nodes
        self.reasons: dict[str, str] = {}
        self.specs = {n.name: recipe.specs(layer_names(n)) for n in nodes}
        self.settled = _settled(nodes)
        self.role = {str(n.name): self._role(n) for n in nodes}
        ends = [
            [str(v.name) for v in values if v.dtype is ir.DataType.FLOAT] for values in (graph.inputs, graph.outputs)
        ]
        self.integral, self.wanted = map(set, ends if target.whole else ([], []))
        self.group: dict[str, str] = {}

    def sites(self) -> dict[str, Site]:
        for node in self.nodes:
            self._forward(node)
        for node in reversed(self.nodes):
            self._backward(node)
        quantized = self._quantized_values()
        self._share(quantized)
        values = (*self.graph.inputs, *(v for node in self.nodes for v in node.outputs))
        sites = {
            str(v.name): self._activation_site(v) for v in values if v.name in quantized and any(self._specs_asked(v))
        }
        for node in self.nodes:
            for site in (*self._weight_sites(node), *self._constant_sites(node)):
                known = sites.setdefault(site.value, site)
                if known is not site and self._is_stored_alike(known, site):  # a table that several nodes look up
                    assert known.readers is not None
                    sites[site.value] = replace(known, readers=known.readers | (site.readers or frozenset()))
            for site in self._bias_sites(node, sites):
                sites.setdefault(site.value, site)
        return sites

    def in_float(self, sites: Mapping[str, Site]) -> list[str]:
        """Nodes that compute in float, in words, without those that do so only because their neighbours do.

        A clip between quantized values is not among them: it is a table of codes.
        """
        found: dict[str, bool] = {}
        for node in self.nodes:
            computed = [v for v in node.inputs if v is not None and v.const_value is None]
            data, name = [v for v in computed if v.name not in self.settled], str(node.name)
            clips = self.target.kernels.get(node.op_type) is Role.ABSORB
            coded = clips and all(v.name in sites for v in (*data, *node.outputs))
            is_float = any(v.dtype in (ir.DataType.FLOAT, None) for v in node.outputs)
            if data and is_float and not coded and self.role[name] in (None, Role.STORE):
                reason = self.reasons.get(name, "")
                formless = bool(reason) or not (node.op_type in self.target.kernels or shares_scale(node))
                found[f"'{name}' ({node.op_type}{': ' * bool(reason)}{reason})"] = formless
        return [words for words, formless in found.items() if formless] or list(found)

    # ---- roles -------------------------------------------------------------------------------------------------

    def _role(self, node: ir.Node) -> Role | None:
        """The node's part under this target and recipe; None keeps it in float and notes why."""
        role = self.target.kernels.get(node.op_type)
        if role is None and any(layers_of(node)):
            role = Role.STORE
        elif self.target.whole and node.op_type == "MatMul" and not any(layers_of(node)):
            role = Role.FOLLOW  # a product of two activations
        elif role is None and shares_scale(node):
            role = Role.MOVE
        if role is None or node.outputs[0].dtype not in _FLOATS or node.outputs[0].name in self.settled:
            return None
        weights, activations = self.specs[node.name]
        if activations.dynamic and role in (*COMPUTING, Role.STORE):
            if reason := why_float.measured_in_float(node, self.target):
                if node.op_type in MULTIPLYING:
                    self.reasons[str(node.name)] = reason
                return Role.STORE if any(layers_of(node)) else None
            role = Role.MULTIPLY
        if reason := why_float.layer_in_float(node, role, weights, activations, self.target):
            self.reasons[str(node.name)] = reason
            return None
        if role in (Role.CONVOLVE, Role.MULTIPLY):
            assert weights.format is not None
            kind = activations.format
            if kind is None or (isinstance(kind.grid, Int) and not is_whole(weights.format.grid)):
                return Role.STORE  # integer activations and weights of another kind have no kernel
            if node.op_type in RECURRENT and len(node.inputs) > 3 and node.inputs[3] is not None:
                both = "a bias of two products; the integer program has it in 32 bits, at the scale of each"
                why = both if self.target.states else "a bias of gates, which are float"
                self.reasons[str(node.inputs[3].name)] = why
        return role

    def _data(self, node: ir.Node) -> dict[int, ir.Value]:
        """Index → input, of the inputs that are neither constants nor weights, biases, shapes or lengths."""
        several = node.op_type in ("Concat", "Add", "Sub", "Mul", "MatMul", *RECURRENT)
        if node.op_type in RECURRENT and self.specs[node.name][1].dynamic:
            several = False  # the layer measures its states itself
        given = {i: v for i, v in enumerate(node.inputs if several else node.inputs[:1]) if v is not None}
        floats = {i: v for i, v in given.items() if v.dtype in _FLOATS and v.name not in self.settled}
        return {index: value for index, value in floats.items() if float_constant(value) is None}

    # ---- which values are quantized ------------------------------------------------------------------------------

    def _forward(self, node: ir.Node) -> None:
        role = self.role[str(node.name)]
        follows = role in (Role.FOLLOW, Role.MOVE, Role.ABSORB)
        if role is Role.CONVOLVE or (follows and any(v.name in self.integral for v in self._data(node).values())):
            self.integral |= {str(v.name) for v in node.outputs}

    def _backward(self, node: ir.Node) -> None:
        role, data = self.role[str(node.name)], list(self._data(node).values())
        behind = {str(self._behind_clip(v).name) for v in node.outputs}
        if role in (Role.FOLLOW, Role.MOVE):
            moves_input = role is Role.MOVE and not self.specs[node.name][1].dynamic
            given = any(v.name in self.integral or (moves_input and v.is_graph_input()) for v in data)
            if not given or not self.wanted & (behind | {str(v.name) for v in node.outputs}):
                self.role[str(node.name)] = role = None
        elif role is Role.ABSORB and node.outputs[0].name in self.wanted and not self._is_absorbed(node):
            self.role[str(node.name)] = None  # its input is read elsewhere: it computes between quantized values
        if role in COMPUTING or role is Role.MOVE:
            self.wanted |= {str(v.name) for v in data}
        if role is Role.FOLLOW:
            self.wanted |= behind

    def _quantized_values(self) -> set[str]:
        quantized = set(self.wanted)
        for node in self.nodes:
            if self.role[str(node.name)] is Role.ABSORB and self._is_absorbed(node) and node.inputs[0] is not None:
                quantized.discard(str(node.inputs[0].name))
        made = (v for n in self.nodes if self.role[str(n.name)] is Role.CONVOLVE for v in n.outputs if v.name)
        quantized |= {str(self._behind_clip(v).name) for v in made if v.uses() or v.is_graph_output()}
        return quantized - self._added_unrounded()

    def _added_unrounded(self) -> set[str]:
        """Values to which the kernel that makes them adds another value: only the sum is rounded."""
        found: set[str] = set()
        for add in self.nodes:
            terms = [v for v in add.inputs if v is not None and float_constant(v) is None]
            if add.op_type != "Add" or self.role[str(add.name)] is not Role.FOLLOW or len(terms) != 2:
                continue
            makers = {v.producer(): v for v in terms if len(v.uses()) == 1 and not v.is_graph_output()}
            able = [n for n in self.nodes if n in makers and n.op_type in self.target.adds]
            if able and self.role[str(able[-1].name)] is Role.CONVOLVE and terms[0].shape == terms[1].shape:
                found.add(str(makers[able[-1]].name))  # the later of two: the other is rounded by then
        return found

    def _is_absorbed(self, clip: ir.Node) -> bool:
        """Whether a clip's only input comes from an integer kernel and goes nowhere else."""
        value = clip.inputs[0]
        if value is None or value.is_graph_output() or len(value.uses()) != 1:
            return False
        producer = value.producer()
        return producer is not None and self.role.get(str(producer.name)) in COMPUTING

    def _behind_clip(self, value: ir.Value) -> ir.Value:
        """What the clip behind makes of a value where it is absorbed, else the value."""
        for reader in value.consumers():
            if self.role.get(str(reader.name)) is Role.ABSORB and self._is_absorbed(reader):
                return reader.outputs[0]
        return value

    # ---- sharing -------------------------------------------------------------------------------------------------

    def _root(self, name: str) -> str:
        while self.group.get(name, name) != name:
            name = self.group[name]
        return name

    def _share(self, quantized: set[str]) -> None:
        for node in self.nodes:
            if self.role[str(node.name)] is Role.MOVE:
                tied = [str(v.name) for v in (*self._data(node).values(), *node.outputs) if v.name in quantized]
                for other in tied[1:]:
                    self.group[self._root(other)] = self._root(tied[0])

    # ---- sites ---------------------------------------------------------------------------------------------------

    def _activation_site(self, value: ir.Value) -> Site:
        maker, readers = self._maker(value), None
        owner = maker
        if maker is None or self.role[str(maker.name)] not in (Role.CONVOLVE, Role.FOLLOW, Role.MOVE):
            readers = frozenset((str(u.node.name), u.idx) for u in value.uses() if self._reads_integers(u.node, u.idx))
            owner = value.producer() if maker is not None else next(iter(value.uses())).node
        assert owner is not None
        spec = next(self._specs_asked(value))
        if spec.format is not None and any(u.node.op_type in OVER_POSITIONS for u in value.uses()):
            spec = replace(spec, format=spec.format.along(1))  # blocks along what is summed over: the channels
        return Site(str(value.name), "activation", spec, str(owner.name), self._root(str(value.name)), readers)

    def _maker(self, value: ir.Value) -> ir.Node | None:
        """The node that makes a value; of what an absorbed clip makes, the kernel in front, which clips as well."""
        node = value.producer()
        if node is None or node.name not in self.specs:
            return None
        clipped = node.inputs[0] if self.role[str(node.name)] is Role.ABSORB and self._is_absorbed(node) else None
        return node if clipped is None else clipped.producer()

    def _reads_integers(self, node: ir.Node, index: int) -> bool:
        role = self.role.get(str(node.name))
        return (role in COMPUTING or role is Role.MOVE) and index in self._data(node)

    def _specs_asked(self, value: ir.Value) -> Iterator[TensorSpec]:
        """What rules may give a quantized value: those of makers first, then of readers, across clips and moves.

        A clip or a move may be float by rule: neither has arithmetic of its own. One of the nodes behind them has a
        format, because a value is quantized only where a kernel with one makes or reads it (none has one where a rule
        leaves an input of a target of integers alone in float). Only a kernel that reads measures the range of each
        input; where all do, what makes the value in float has no say.
        """
        maker = self._maker(value)
        made_in_float = maker is None or self.role[str(maker.name)] not in (Role.CONVOLVE, Role.FOLLOW, Role.MOVE)
        readers = [u.node for u in value.uses() if self._reads_integers(u.node, u.idx)]
        measured = bool(readers) and all(self._measures(node) for node in readers)
        for makers in (False,) if made_in_float and measured else (True, False):
            for node in self._nodes_beside(value, makers):
                spec = self.specs[node.name][1]
                if spec.format is not None and (not spec.dynamic or (not makers and self._measures(node))):
                    yield spec

    def _measures(self, node: ir.Node) -> bool:
        return self.specs[node.name][1].dynamic and self.role[str(node.name)] is Role.MULTIPLY

    def _nodes_beside(self, value: ir.Value, makers: bool) -> Iterator[ir.Node]:
        producer = value.producer()
        for node in ([producer] if producer is not None else []) if makers else [u.node for u in value.uses()]:
            if node.name in self.specs:
                yield node
                if self.role[str(node.name)] in (Role.ABSORB, Role.MOVE):
                    for other in self._data(node).values() if makers else node.outputs:
                        yield from self._nodes_beside(other, makers)

    def _weight_sites(self, node: ir.Node) -> Iterator[Site]:
        spec, role = self.specs[node.name][0], self.role[str(node.name)]
        if role not in (Role.CONVOLVE, Role.MULTIPLY, Role.STORE):
            return
        for layer in layers_of(node):
            name = str(layer.value.name)
            if reason := why_float.weight_in_float(layer, spec, role):
                self.reasons[name] = reason
                continue
            assert spec.format is not None
            kind = orient(spec.format, layer.output_axis, layer.summed_axis, layer.weight.shape)
            reader = frozenset({(str(node.name), layer.index)})
            yield Site(name, "weight", replace(spec, format=kind), str(node.name), name, reader)

    def _is_stored_alike(self, one: Site, other: Site) -> bool:
        """Whether two readers of a weight that compute in float may read the same codes."""
        floats = all(self.role[site.layer] is Role.STORE for site in (one, other))
        return floats and one.role == other.role == "weight" and one.spec == other.spec

    def _constant_sites(self, node: ir.Node) -> Iterator[Site]:
        """The constant operand of an integer Add or Mul; gain and bias of a normalization go into its multipliers."""
        if self.role[str(node.name)] is not Role.FOLLOW or node.op_type == "LayerNormalization":
            return
        for index, value in enumerate(node.inputs):
            if value is not None and float_constant(value) is not None:
                name, reader = str(value.name), frozenset({(str(node.name), index)})
                yield Site(name, "constant", self.specs[node.name][1], str(node.name), name, reader)

    def _bias_sites(self, node: ir.Node, sites: Mapping[str, Site]) -> Iterator[Site]:
        if self.role[str(node.name)] not in (Role.CONVOLVE, Role.MULTIPLY) or node.op_type in RECURRENT:
            return  # the bias of a recurrent layer belongs to two products, and stays float beside 16-bit gates
        layer, read = next(layers_of(node)), node.inputs[0]
        bias, weights = layer.bias_value, sites.get(str(layer.value.name))
        data = None if read is None else sites.get(str(read.name))
        if bias is None or weights is None or data is None or float_constant(bias) is None:
            return
        name = str(bias.name)
        if reason := why_float.bias_in_float(bias, layer, weights.spec, data.spec):
            self.reasons[name] = reason
        else:  # int32 whatever the recipe says
            yield Site(name, "bias", FLOAT, str(node.name), name, None, (data.value, weights.value))


def _settled(nodes: list[ir.Node]) -> set[str]:
    """Values that constants and the shapes of inputs decide."""
    found: set[str] = set()
    for node in nodes:
        given = [v for v in node.inputs if v is not None and v.const_value is None]
        if given and (node.op_type in ("Shape", "Size") or all(v.name in found for v in given)):
            found |= {str(v.name) for v in node.outputs}
    return found
