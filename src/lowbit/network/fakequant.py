"""The network while it is still torch: quantizers on the edges that a placement names.

One `FakeQuant` serves all sites that share a scale. It is an ordinary module: off it passes its input on, observing it
also folds it into statistics, probing it keeps it for a gradient, quantizing it rounds to the format (straight-through
gradient).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from lowbit.errors import UnsupportedError
from lowbit.network.build import build
from lowbit.network.sites import Placement, Site
from lowbit.numerics import (
    TENSOR,
    Fitted,
    Format,
    Grid,
    Int,
    QuantTensor,
    fake_quantize_rows,
    from_rows,
    quantize,
    spell_format,
    to_rows,
)
from lowbit.ranges import Histogram, RawRows
from lowbit.recipe import TensorSpec

Mode = Literal["off", "observe", "probe", "quantize"]


def fake_quantize(x: Tensor, format: Format, scale: Tensor, zero: Tensor) -> Tensor:
    """x rounded to a format. The gradient is 1 inside the range and 0 outside (straight-through estimator).

    scale, zero   one per tile, in the shape of the grid of tiles or a scalar for a single tile
    """
    grid = fixed_grid(format)
    if isinstance(grid, Int) and scale.numel() == 1 and format.rounding == "nearest":
        scale, zero = scale.reshape(()), zero.reshape(())
        if x.requires_grad and torch.is_grad_enabled():
            return torch.fake_quantize_per_tensor_affine(x, scale, zero.to(torch.int32), grid.minimum, grid.maximum)
        # 0.13 ns an element on two cores, where torch's fused function takes 1.6; a scale of 0 makes exact zeros
        low, high = grid.minimum - float(zero), grid.maximum - float(zero)
        return x.div(torch.where(scale != 0, scale, torch.inf)).round_().clamp_(low, high).mul_(scale)
    assert format.block is not None
    tile = format.block.tile(tuple(x.shape))
    scale, zero = scale.reshape(-1, 1), zero.reshape(-1, 1)
    with torch.no_grad():
        rows = to_rows(x, format.block)
        rounded = fake_quantize_rows(rows, scale, zero, grid, format.rounding)
        half = scale / 2
        low, high = grid.values()[0], grid.values()[-1]
        inside = (rows >= (low - zero) * scale - half) & (rows <= (high - zero) * scale + half)
        y = from_rows(rounded, tuple(x.shape), tile).to(x.dtype)
        passes = from_rows(inside, tuple(x.shape), tile)
    return y + (x - x.detach()) * passes


def fixed_grid(format: Format) -> Grid:
    """The format's grid; UnsupportedError where it has to be fitted to each tensor, which only weights can be."""
    if not isinstance(format.grid, Int) and isinstance(format.grid, Fitted):
        raise UnsupportedError(
            f"format '{spell_format(format)}' is fitted to the values of one tensor: it serves weights only."
        )
    return format.grid


def as_stored(x: Tensor, like: Tensor | None = None) -> Tensor:
    """The same numbers in the order in which they lie in memory, or `like` does: adding them up then copies nothing."""
    like = x if like is None else like
    strided = like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1) if strided else x


class FakeQuant(nn.Module):
    """A quantizer of one format.

    scale, zero    per tile, in the shape of the grid of tiles; a scalar for one tile; empty until `set_parameters`
    statistics     what observing has seen
    stored         the codes of a constant, once they are solved
    decoded        their values, from the first time that they are asked for
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, spec: TensorSpec, values: tuple[str, ...]) -> None:
        super().__init__()
        self.spec, self.values = spec, values
        self.mode: Mode = "off"
        self.statistics = Histogram()
        self.stored: QuantTensor | None = None
        self.decoded: Tensor | None = None
        self.probes: list[Tensor] = []
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero", torch.empty(0))

    @property
    def format(self) -> Format:
        assert self.spec.format is not None
        return self.spec.format

    @property
    def dynamic(self) -> bool:
        """Whether ranges are measured on each input: asked for, or because blocks have no range known beforehand."""
        kind = self.format
        # Int first: asking whether a grid has the methods of Fitted takes 50 µs, at every call of every quantizer.
        fitted = not isinstance(kind.grid, Int) and isinstance(kind.grid, Fitted)
        return self.spec.dynamic or kind.block != TENSOR or kind.shares_scale or fitted

    def _measured(self, x: Tensor) -> Tensor:
        """x in the format, its range measured on x itself."""
        kind, held = self.format, x.detach()
        if kind.block is None or kind.shares_scale:
            return torch.as_tensor(quantize(held, kind).dequantize())
        bounds = self.spec.range.bounds(RawRows(to_rows(held, kind.block)), kind)
        return torch.as_tensor(quantize(held, kind, bounds).dequantize())

    @property
    def grid(self) -> Grid:
        """Of an activation: a grid that is known before the data."""
        return fixed_grid(self.format)

    @property
    def ready(self) -> bool:
        return self.scale.numel() > 0

    def set_parameters(self, scale: Tensor, zero: Tensor) -> None:
        self.scale, self.zero = scale.to(self.scale.device), zero.to(self.scale.device)

    def store(self, stored: QuantTensor) -> None:
        """Take the codes of a constant, and the scales and zeros that belong to them."""
        self.stored, self.decoded = stored, None
        scale, zero = stored.scale_values(), stored.zero_values()
        assert isinstance(scale, Tensor)
        assert isinstance(zero, Tensor)
        self.set_parameters(scale, zero)

    def limits(self) -> tuple[float, float]:
        """Smallest and largest number that a per-tensor quantizer can give."""
        values = self.grid.values()
        return tuple(float((end - self.zero) * self.scale) for end in (values[0], values[-1]))  # type: ignore[return-value]

    def take_probes(self) -> list[Tensor]:
        """What passed through in probe mode since the last call, as leaves or links of one autograd graph."""
        found, self.probes = self.probes, []
        return found

    def rounded(self, x: Tensor) -> Tensor:
        """What quantizing makes of x; as it is where no range is known yet. Its gradient goes straight through."""
        if self.stored is not None or self.dynamic:
            y = self._measured(x) if self.stored is None else self._decoded(x)
            return x + (y - x).detach() if x.requires_grad and torch.is_grad_enabled() else y
        return fake_quantize(x, self.format, self.scale, self.zero) if self.ready else x

    def _decoded(self, x: Tensor) -> Tensor:
        """Values of the stored codes, as x lies; decoding at every call made a product of 2048² take 43 ms, not 6."""
        assert self.stored is not None
        if self.decoded is None or self.decoded.device != x.device or self.decoded.dtype != x.dtype:
            self.decoded = torch.as_tensor(self.stored.dequantize()).to(x)
        return self.decoded

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "observe":
            self.statistics.add(as_stored(x))
        elif self.mode == "probe" and x.is_floating_point():
            # Its own link of the graph: the gradient is that of who reads the quantized value, not of other readers.
            # Not view_as: of one sample it gives strides that torch's kernels take for channels first; copying between
            # the two orders took a fifth of the time in which DeepLab's ranges are chosen.
            x = x[...] if x.requires_grad else x.detach().requires_grad_()
            self.probes.append(x)
        elif self.mode == "quantize":
            return self.rounded(x)
        return x

    def extra_repr(self) -> str:
        return f"{self.spec!r}, mode={self.mode!r}"


class FakeBias(nn.Module):
    """A bias rounded to int32 at the product of its layer's activation and weight scales."""

    def __init__(self, activation: FakeQuant, weight: FakeQuant) -> None:
        super().__init__()
        self.sources = (activation, weight)  # a tuple hides them from state_dict: they are registered where they act
        self.mode: Mode = "off"

    def scale(self) -> Tensor:
        activation, weight = self.sources
        return activation.scale.reshape(()) * weight.scale.reshape(-1)

    def codes(self, bias: Tensor) -> Tensor:
        limit = 2.0**31 - 1
        return torch.round(bias.double() / self.scale().double()).clamp(-limit, limit)

    def forward(self, bias: Tensor) -> Tensor:
        if self.mode != "quantize" or not all(s.ready for s in self.sources):
            return bias
        rounded = (self.codes(bias) * self.scale().double()).to(bias.dtype)
        return bias + (rounded - bias).detach()


class Simulation:
    """A program as an fx module with its quantizers in place.

    module       the network; forward takes the graph's inputs and gives {output: tensor}
    quantizers   value name → FakeQuant (one object for all values of a group) or FakeBias
    """

    def __init__(self, program: ir.Model, placement: Placement) -> None:
        self.program, self.placement = program, placement
        self.module: fx.GraphModule = build(program).eval()
        self.quantizers: dict[str, FakeQuant | FakeBias] = {}
        self.nodes: dict[str, fx.Node] = {}  # value name → the fx node of its quantized value
        self.edited: set[str] = set()  # initialisers whose parameters no longer hold what the program holds
        by_value = {str(n.meta["value"]): n for n in self.module.graph.nodes if "value" in n.meta}
        groups = placement.groups()
        for site in placement.sites.values():
            self._insert(site, by_value[site.value], groups)
        self.module.graph.lint()
        self.module.recompile()

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
        with self.module.graph.inserting_before(after):
            node = self.module.graph.call_module(name, (source,))
        node.meta["quantized_value"] = site.value
        for user in readers:
            user.replace_input_with(source, node)
        self.nodes[site.value] = node

    def _quantizer(self, site: Site, groups: dict[str, list[Site]]) -> FakeQuant | FakeBias:
        if site.role == "bias":
            assert site.product is not None
            activation, weight = (self.quantizers[v] for v in site.product)
            assert isinstance(activation, FakeQuant)
            assert isinstance(weight, FakeQuant)
            return FakeBias(activation, weight)
        if site.role == "activation":
            if site.group in self.quantizers:
                return self.quantizers[site.group]
            return FakeQuant(site.spec, tuple(s.value for s in groups[site.group]))
        return FakeQuant(site.spec, (site.value,))

    def activations(self) -> dict[str, FakeQuant]:
        """Group → its quantizer."""
        return {
            site.group: q
            for site in self.placement.sites.values()
            if site.role == "activation" and isinstance(q := self.quantizers[site.group], FakeQuant)
        }

    def constants(self) -> dict[str, tuple[Site, FakeQuant]]:
        """Weights and constant operands: value name → its site and quantizer."""
        return {
            name: (site, q)
            for name, site in self.placement.sites.items()
            if site.role in ("weight", "constant") and isinstance(q := self.quantizers[name], FakeQuant)
        }

    def parameter(self, value: str) -> Tensor:
        """The tensor of an initialiser."""
        key = self.module.meta["keys"][value]
        owner, _, name = key.rpartition(".")
        found = getattr(self.module.get_submodule(owner), name)
        assert isinstance(found, Tensor)
        return found

    @contextmanager
    def mode(self, mode: Mode, chosen: "Iterable[FakeQuant] | None" = None) -> Iterator[None]:
        """These quantizers in this mode, all others off; by default all, and to observe those of activations."""
        modules = [m for m in self.module.modules() if isinstance(m, FakeQuant | FakeBias)]
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


def _after(source: fx.Node) -> fx.Node:
    """The node before which something that reads `source` may be put: behind the placeholders and parameters."""
    node = source.next
    while node.op in ("placeholder", "get_attr"):
        node = node.next
    return node
