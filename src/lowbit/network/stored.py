"""Quantizers of weights and biases: what is stored of them, and how it trains.

A weight is stored codes, decoded once. While it trains, its codes may follow the float weight underneath, or stay while
the values in their table train. Both work with a mask of pruned weights, and on any network that has the quantizers.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.network.learned_bases import LearnedBases
from lowbit.network.learned_weights import WeightLearner
from lowbit.network.learners import weight_learner
from lowbit.network.quantizers import FakeQuant, Mode, Quantizer
from lowbit.network.straight_through import straight_through
from lowbit.numerics import QuantTensor, describe_format
from lowbit.numerics.rows import expand_tiles, from_rows
from lowbit.ranges import Learned
from lowbit.recipe import TensorSpec

HELD = "stored_"  # begins the names of buffers that are parts of what is stored


def _parts(stored: QuantTensor) -> dict[str, Tensor]:
    """Its tensors but the codes; those of a scale in codes under 'scale_…'."""
    found: dict[str, Tensor] = {}
    for name in ("scale", "zero", "table"):
        part = getattr(stored, name)
        if isinstance(part, QuantTensor):
            found |= {
                f"{name}_{inner}": t for inner, t in (_parts(part) | {"codes": torch.as_tensor(part.codes)}).items()
            }
        elif part is not None:
            found[name] = torch.as_tensor(part)
    return found


def _with_parts(stored: QuantTensor, parts: Mapping[str, Tensor]) -> QuantTensor:
    changed: dict[str, Any] = {name: parts[name] for name in ("scale", "zero", "table", "codes") if name in parts}
    if isinstance(stored.scale, QuantTensor):
        inner = {name.removeprefix("scale_"): t for name, t in parts.items() if name.startswith("scale_")}
        changed["scale"] = _with_parts(stored.scale, inner)
    return replace(stored, **changed)


def _with_zeros(stored: QuantTensor, mask: Tensor) -> QuantTensor:
    """The same codes, but that of 0 where the mask is False."""
    codes = torch.as_tensor(stored.codes)
    none = stored.encode(torch.zeros(stored.shape, device=codes.device))
    if bool(torch.as_tensor(none.dequantize())[~mask].any()):
        raise InputError(
            f"{describe_format(stored.format)} has no 0, which pruned weights need: choose another format, or for a "
            "codebook the solver 'kmeans'."
        )
    return replace(stored, codes=torch.where(mask, codes, torch.as_tensor(none.codes)))


PIECE = 1 << 20  # numbers that are decoded at a time, of what is too large to be decoded at once
_LARGE = 1 << 28  # bytes of decoded values that are kept in memory


class WeightQuant(Quantizer):
    """The quantizer of a weight or another constant.

    stored   its codes, once they are solved
    mask     False where the weight is pruned; its gradient still reaches it, so it can come back (Guo et al. 2016)
    trains   "codes": they follow the weight, each at its nearest value, and the gradient reaches the weight straight
             through; "values": codes stay and `table` trains; None: what is stored stays
    table    a Parameter, the table of `stored` while it trains
    latent   a Parameter, the weight in steps of its tiles that codes follow after `follow`, until `store`
    factor   a Parameter beside it, by which the scale of each tile is multiplied; None where scales are stored in codes
    learner  while the range learns: what rounds the weight
    """

    mask: Tensor | None
    table: nn.Parameter | None
    latent: nn.Parameter | None
    factor: nn.Parameter | None

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__(spec)
        self.stored: QuantTensor | None = None
        self.trains: Literal["codes", "values"] | None = None
        self.decoded: Tensor | None = None  # the values of `stored`, from the first time that they are asked for
        self.positions: Tensor | None = None  # where in the table each value is, while the table trains
        self.register_buffer("mask", None)
        self.register_parameter("table", None)
        self.register_parameter("latent", None)
        self.register_parameter("factor", None)
        self.learner: WeightLearner | LearnedBases | None = None
        self.steps = torch.empty(0)  # of each weight's tile, while there is a latent weight

    @property
    def ready(self) -> bool:
        return self.stored is not None

    @property
    def scale(self) -> Tensor:
        """The scale of each tile, in the shape of the grid of tiles."""
        assert self.stored is not None
        return torch.as_tensor(self.stored.scale_values()) if self.learner is None else self.learner.scale

    def store(self, stored: QuantTensor, trains: Literal["codes", "values"] | None = None) -> None:
        """Take codes with the scales or tables that belong to them, and say what of them trains from now on.

        Pruned weights get the code of 0; InputError where there is none.
        """
        if self.mask is not None:
            stored = _with_zeros(stored, self.mask)
        self.stored, self.trains, self.decoded, self.table, self.positions = stored, trains, None, None, None
        self.latent = self.factor = self.learner = None
        for name in [n for n in self._buffers if n.startswith(HELD)]:
            del self._buffers[name]
        if trains == "values":
            if stored.table is None:
                raise InputError(f"{stored!r} has no table of values that could train.")
            self.table, self.positions = nn.Parameter(torch.as_tensor(stored.table).clone()), stored.table_positions()

    def learn(self, weight: Tensor) -> nn.Module | None:
        """Let codes follow the weight, and scales learn by the method of the spec's range, until the next `store`.

        Where that range does not learn, scales stay, and there is no learner.
        """
        assert self.stored is not None
        if not isinstance(self.spec.range, Learned):
            self.store(self.stored, trains="codes")
            return None
        self.learner = weight_learner(self.spec.range, self.stored, self._masked(weight))
        return self.learner

    def follow(self, weight: Tensor) -> list[nn.Parameter]:
        """Let codes follow a weight of their own that learns, and scales learn; the network's weight stays.

        It begins half way between what is stored and `weight`, but not so far that it rounds to another code.
        """
        assert self.stored is not None
        before = torch.as_tensor(self.stored.dequantize())
        self.steps = expand_tiles(self.stored.steps(), self.stored.shape, self.stored.tile)
        half = self.steps / 2
        self.latent = nn.Parameter((before + (weight.detach() - before).clamp(-half, half) / 2) / self.steps)
        if not isinstance(self.stored.scale, Tensor):
            return [self.latent]
        self.factor = nn.Parameter(torch.ones(self.stored.tiles))
        return [self.latent, self.factor]

    def keep_in_state(self) -> None:
        """Let the scales, zeros and tables of what is stored be a part of the module's state, and move with it."""
        assert self.stored is not None
        for name, tensor in _parts(self.stored).items():
            self.register_buffer(f"{HELD}{name}", tensor)

    def _apply(self, fn: Any, recurse: bool = True) -> "WeightQuant":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        held = {n.removeprefix(HELD): t for n, t in self._buffers.items() if n.startswith(HELD) and t is not None}
        if held and self.stored is not None:
            self.stored, self.decoded = _with_parts(self.stored, held), None
        return self

    def current(self, weight: Tensor) -> QuantTensor:
        """What is stored, with the codes or the table that it has now."""
        assert self.stored is not None
        if self.learner is not None:
            return self.learner.stored(self._masked(weight))
        if self.trains == "codes":
            return self.stored.encode(self._masked(weight.detach()))
        if self.latent is not None:
            followed = self.stored.encode(self.latent.detach() * self.steps)
            return followed if self.factor is None else replace(followed, scale=self.scale * self.factor.detach())
        return self.stored if self.table is None else replace(self.stored, table=self.table.detach().clone())

    def rounded(self, x: Tensor) -> Tensor:
        """The values that are stored, or that the weight x rounds to; x without its pruned weights before that."""
        if self.stored is None:
            return x if self.mask is None else straight_through(x, self._masked(x.detach()))
        if self.learner is not None:
            kept = x if self.mask is None else straight_through(x, self._masked(x.detach()))
            learned: Tensor = self.learner(kept)
            return learned
        if self.trains == "codes":
            return straight_through(x, torch.as_tensor(self.current(x).dequantize()))
        if self.latent is not None:
            weight = self.latent * self.steps
            nearest = straight_through(weight, torch.as_tensor(self.stored.encode(weight.detach()).dequantize()))
            return nearest if self.factor is None else nearest * expand_tiles(self.factor, x.shape, self.stored.tile)
        if self.table is not None:
            # A value of exactly 0 stays 0: it is what pruned weights have.
            values = torch.where(self.table != 0, self.table, 0.0)
            looked_up: Tensor = _Lookup.apply(values.reshape(-1), self.positions)  # type: ignore[no-untyped-call]
            return from_rows(looked_up, self.stored.shape, self.stored.tile)
        return straight_through(x, self._decoded(x))

    def _masked(self, x: Tensor) -> Tensor:
        return x if self.mask is None else x * self.mask

    def _decoded(self, x: Tensor) -> Tensor:
        """Values of the stored codes, as x lies; decoding at every call made a product of 2048² take 43 ms, not 6."""
        assert self.stored is not None
        if self.decoded is None or self.decoded.device != x.device or self.decoded.dtype != x.dtype:
            large = x.device.type == "cpu" and x.numel() * x.element_size() > _LARGE
            self.decoded = _in_a_file(self.stored, x) if large else torch.as_tensor(self.stored.dequantize()).to(x)
        return self.decoded


def _in_a_file(stored: QuantTensor, like: Tensor) -> Tensor:
    """The values in a mapped temporary file: a table larger than memory is decoded and read in parts."""
    with tempfile.TemporaryFile() as file:
        file.truncate(like.numel() * like.element_size())
        held = np.memmap(file, str(like.dtype).removeprefix("torch."), "r+", shape=tuple(like.shape))
    values = torch.from_numpy(held)
    for rows, piece in stored.by_rows(max(1, PIECE // max(1, like[0].numel()))):
        values[rows] = torch.as_tensor(piece.dequantize()).to(like)
    return values


class _Lookup(torch.autograd.Function):
    """values[positions]; the gradient of a value is the sum of those of its places (Han et al. 2016, section 3.2)."""

    @staticmethod
    def forward(context: Any, values: Tensor, positions: Tensor) -> Tensor:
        context.save_for_backward(positions)
        context.count = values.numel()
        return values[positions]

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (positions,) = context.saved_tensors
        gradient = gradients[0].float().reshape(-1)
        return gradient.new_zeros(context.count).index_add_(0, positions.reshape(-1), gradient), None


class FakeBias(nn.Module):
    """A bias rounded to int32 at the product of its layer's activation and weight scales."""

    def __init__(self, activation: FakeQuant, weight: WeightQuant) -> None:
        super().__init__()
        self.sources = (activation, weight)  # a tuple hides them from state_dict: they are registered where they act
        self.mode: Mode = "off"

    @property
    def acts(self) -> bool:
        """Whether it rounds: both scales are known."""
        return self.mode == "quantize" and all(s.ready for s in self.sources)

    def scale(self) -> Tensor:
        activation, weight = self.sources
        return activation.held()[0].reshape(()) * weight.scale.reshape(-1)

    def codes(self, bias: Tensor, factor: "Tensor | float" = 1.0) -> Tensor:
        """factor: of the layer's outputs, which will go into the scale of its weight"""
        limit = 2.0**31 - 1
        return torch.round(bias.double() / self.step(factor)).clamp(-limit, limit)

    def step(self, factor: "Tensor | float" = 1.0) -> Tensor:
        """What one of its codes means, float64."""
        return (self.scale() * torch.as_tensor(factor).abs()).double()

    def forward(self, bias: Tensor, factor: "Tensor | float" = 1.0) -> Tensor:
        if not self.acts:
            return bias
        with torch.no_grad():
            rounded = (self.codes(bias, factor) * self.step(factor)).to(bias.dtype)
        return straight_through(bias, rounded)
