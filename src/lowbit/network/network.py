"""The network: a program as a torch module with a quantizer on each edge that a placement names.

One `FakeQuant` serves all sites that share a scale. All else stays an ordinary module: it runs, trains and moves
between devices.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from lowbit.graph.layer import RECURRENT, layer_names, layers_of
from lowbit.network.build import build
from lowbit.network.quantized_recurrence import STEPS, QuantizedRecurrence
from lowbit.network.quantizers import FakeQuant, Mode, Quantizer
from lowbit.network.sites import Placement, Site
from lowbit.network.stored import FakeBias, WeightQuant
from lowbit.recipe import DYNAMIC


class Network:
    """A program as an fx module with its quantizers in place.

    module       the network; forward takes the graph's inputs and gives {output: tensor}
    quantizers   value name → FakeQuant (one object for all values of a group), WeightQuant or FakeBias
    recurrent    names of the LSTMs, GRUs and RNNs that measure the range of what they multiply
    """

    def __init__(self, program: ir.Model, placement: Placement) -> None:
        self.program, self.placement = program, placement
        self.module: fx.GraphModule = build(program).eval()
        self.quantizers: dict[str, FakeQuant | WeightQuant | FakeBias] = {}
        self.nodes: dict[str, fx.Node] = {}  # value name → the fx node of its quantized value
        by_value = {str(n.meta["value"]): n for n in self.module.graph.nodes if "value" in n.meta}
        groups = placement.groups()
        self.before_steps: dict[str, Tensor] = {}  # parameters that steps may edit, as the float network has them
        for site in placement.sites.values():
            self._insert(site, by_value[site.value], groups)
        steps = [n for n in self.module.graph.nodes if n.target in STEPS and n.meta["node"] in placement.integer]
        self.recurrent = frozenset(str(call.meta["node"]) for call in steps) - placement.states.keys()
        for call in steps:
            self._round_states(call)
        self._keep_zeros()
        self.module.graph.lint()
        self.module.recompile()

    def _keep_zeros(self) -> None:
        """Weights that the recipe's rules have pruned stay zero, whatever solver or step finds their codes."""
        layers = [layer for node in self.program.graph for layer in layers_of(node)]
        names = {str(layer.value.name): layer_names(layer.node) for layer in layers}
        for _, weights in self.placement.recipe.prunings(names):
            for name in weights:
                quantizer, kept = self.quantizers.get(name), self.parameter(name) != 0
                if isinstance(quantizer, WeightQuant) and not bool(kept.all()):
                    quantizer.mask = kept

    def __deepcopy__(self, memo: dict[int, Any]) -> "Network":
        """Another module with its own parameters and quantizers, of the same program and placement."""
        copied = object.__new__(Network)
        memo[id(self)] = copied
        vars(copied).update(vars(self))
        copied.module = deepcopy(self.module, memo)
        copied.quantizers, copied.before_steps = deepcopy((self.quantizers, self.before_steps), memo)
        by_value = {n.meta["quantized_value"]: n for n in copied.module.graph.nodes if "quantized_value" in n.meta}
        copied.nodes = {value: by_value[value] for value in self.nodes if value in by_value}
        return copied

    def _round_states(self, call: fx.Node) -> None:
        """Let a recurrent layer round its states at each step; one that measures quantizes what it reads, too."""
        (source, *_), states = call.all_input_nodes, self.placement.states.get(str(call.meta["node"]), {})
        site, spec = self.placement.sites.get(str(source.meta.get("quantized_value"))), None if states else DYNAMIC
        if site is not None and site.spec.dynamic:
            spec = site.spec
            call.replace_input_with(source, source.all_input_nodes[0])
        call.meta["exact"], name = call.target, f"quantized_{call.name}"
        self.module.add_submodule(name, QuantizedRecurrence(call.meta["exact"], spec, states))
        call.op, call.target = "call_module", name

    def _insert(self, site: Site, source: fx.Node, groups: dict[str, list[Site]]) -> None:
        quantizer = self._quantizer(site, groups)
        name = f"quantize_{len(self.quantizers)}"
        first = self.quantizers.get(site.group) if site.role == "activation" else None
        if first is None:
            self.module.add_submodule(name, quantizer)
        else:
            name = next(n for n, m in self.module.named_modules() if m is first)
        self.quantizers[site.value] = quantizer
        self.quantizers.setdefault(site.group, quantizer)
        readers = [
            user
            for user in list(source.users)
            if site.readers is None or user.meta.get("node") in {n for n, _ in site.readers}
        ]
        after = _after(source)
        if site.product is not None and not after > (weight := self.nodes[site.product[1]]):
            after = weight.next  # a scale that learns is known once it has rounded the weight
        with self.module.graph.inserting_before(after):
            node = self.module.graph.call_module(name, (source,))
        node.meta["quantized_value"] = site.value
        for user in readers:
            user.replace_input_with(source, node)
        self.nodes[site.value] = node

    def _quantizer(self, site: Site, groups: dict[str, list[Site]]) -> FakeQuant | WeightQuant | FakeBias:
        if site.role == "bias":
            assert site.product is not None
            activation, weight = (self.quantizers[v] for v in site.product)
            assert isinstance(activation, FakeQuant)
            assert isinstance(weight, WeightQuant)
            return FakeBias(activation, weight)
        if site.role == "activation":
            if site.group in self.quantizers:
                return self.quantizers[site.group]
            return FakeQuant(site.spec, tuple(s.value for s in groups[site.group]))
        return WeightQuant(site.spec)

    def activations(self) -> dict[str, FakeQuant]:
        """Group → its quantizer."""
        return {
            site.group: q
            for site in self.placement.sites.values()
            if site.role == "activation" and isinstance(q := self.quantizers[site.group], FakeQuant)
        }

    def constants(self) -> dict[str, tuple[Site, WeightQuant]]:
        """Weights and constant operands: value name → its site and quantizer."""
        return {
            name: (site, q)
            for name, site in self.placement.sites.items()
            if isinstance(q := self.quantizers[name], WeightQuant)
        }

    def is_stored(self, value: str) -> bool:
        """Whether an initialiser becomes codes in the file."""
        quantizer = self.quantizers.get(value)
        return isinstance(quantizer, FakeBias) or (isinstance(quantizer, WeightQuant) and quantizer.stored is not None)

    def parameter(self, value: str) -> Tensor:
        """The tensor of an initialiser."""
        key = self.module.meta["keys"][value]
        owner, _, name = key.rpartition(".")
        found = getattr(self.module.get_submodule(owner), name)
        assert isinstance(found, Tensor)
        return found

    @contextmanager
    def mode(self, mode: Mode, chosen: "Iterable[Quantizer | FakeBias] | None" = None) -> Iterator[None]:
        """These quantizers in this mode, all others off; by default all, and to observe those of activations."""
        modules = [m for m in self.module.modules() if isinstance(m, Quantizer | FakeBias)]
        before = [m.mode for m in modules]
        some = self.activations().values() if mode == "observe" and chosen is None else chosen
        active = {id(m) for m in (modules if some is None else some)}
        for m in modules:
            m.mode = mode if id(m) in active else "off"
        try:
            yield
        finally:
            for m, old in zip(modules, before, strict=True):
                m.mode = old

    def rounding(self, *, states: bool) -> list[Quantizer | FakeBias]:
        """All quantizers, with those of recurrent layers' states of fixed scale or without."""
        recurrent = [m for m in self.module.modules() if isinstance(m, QuantizedRecurrence)]
        left = {m for layer in recurrent for m in layer.states.values()} if not states else set()
        return [m for m in self.module.modules() if isinstance(m, Quantizer | FakeBias) and m not in left]

    def placed(self, placement: Placement, *, keep_ranges: bool = False) -> "Network":
        """The same program under another placement, with what the activations have observed, and chosen if asked."""
        renewed = Network(self.program, placement)
        if self.before_steps:
            renewed.keep_before_steps()
        for quantizer in renewed.activations().values():
            known = next((q for v in quantizer.values if isinstance(q := self.quantizers.get(v), FakeQuant)), None)
            if known is not None:
                quantizer.statistics = known.statistics
                if keep_ranges:
                    quantizer.spec = replace(quantizer.spec, range=known.spec.range)
        return renewed

    def place_again(self, placement: Placement) -> None:
        """Another placement, with the program's parameters, and with what the activations have observed and chosen."""
        vars(self).update(vars(self.placed(placement, keep_ranges=True)))

    def keep_before_steps(self) -> None:
        """From here on exact walks read the biases and factors that there are now, whatever steps make of them."""
        self.before_steps = {name: p.detach().clone() for name, p in self._vectors()}

    def _vectors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that are vectors of any rank; the biases of recurrent layers have a row for each direction."""
        layers = [node for node in self.program.graph if node.op_type in RECURRENT and len(node.inputs) > 3]
        keys = self.module.meta["keys"]
        biases = {keys.get(str(node.inputs[3].name)) for node in layers if node.inputs[3] is not None}
        for name, p in self.module.named_parameters():
            if p.numel() == max(p.shape, default=1) or name in biases:
                yield name, p

    def undo(self) -> Callable[[], None]:
        """What puts all of it back: placement, codes, ranges, and parameters that are vectors of any rank.

        Matrices are not copied: no step edits a float weight, only its codes.
        """
        own = dict(vars(self))
        quantizers = [(q, _contents(q)) for q in set(self.quantizers.values())]
        vectors = [(p, p.detach().clone()) for _, p in self._vectors()]

        @torch.no_grad()
        def put_back() -> None:
            vars(self).update(own)
            for quantizer, contents in quantizers:
                vars(quantizer).update(contents)
            for parameter, before in vectors:
                parameter.copy_(before)

        return put_back


def _contents(module: nn.Module) -> dict[str, Any]:
    """What a module holds, as it is now."""
    return {name: dict(held) if isinstance(held, dict) else held for name, held in vars(module).items()}


def _after(source: fx.Node) -> fx.Node:
    """The node before which something that reads `source` may be put: behind the placeholders and parameters."""
    node = source.next
    while node.op in ("placeholder", "get_attr"):
        node = node.next
    return node
