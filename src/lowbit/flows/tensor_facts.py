"""What is measured of each quantized tensor: its values, its range, its own rounding error, and what that costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.engines.compile import Batch
from lowbit.graph.layer import layers_of
from lowbit.network.calibrate import forward, tensors
from lowbit.network.in_step import Walk, in_step
from lowbit.network.network import Network
from lowbit.network.quantizers import FakeQuant
from lowbit.network.sites import Site
from lowbit.network.stored import WeightQuant
from lowbit.numerics import TENSOR, describe_format
from lowbit.numerics.noise import decibels
from lowbit.ranges import Histogram, range_words

BINS = 60  # of a histogram that is drawn
NEARLY_ZERO = 1e-6  # of the largest channel: training switches channels off by weights of 1e-12


@dataclass(frozen=True)
class TensorFacts:
    """A quantized tensor. All shares are parts of 1; what does not apply is None.

    layer           name of the node that reads a weight, or makes an activation
    low, high       ends of the range of an activation
    minimum, maximum  of its values: of a weight, or of an activation over the calibration data
    median, p999    half, and 99.9 %, of its values that are not 0 are at most this large, signs aside
    step            between two neighbouring codes, of a tensor with one scale; else 0
    sqnr_db         10 log10(Σ x² / Σ (x − x̂)²) of its own rounding
    clipped         share of its values outside low … high
    clipping_noise  share of Σ (x − x̂)² that these values make
    below_zero      share of its values that are negative, and `codes_below_zero` that they have
    growth          change of the range from half of the samples to all, in parts of its width
    channel_ranges  least, median and greatest of its channels' largest magnitudes; dead channels, `dead_channels` of
                    `channels`, aside: those that are always 0, to 1e-6 of the largest
    cost            squared error that its rounding alone adds to the outputs, in parts of their power, to first order
    counts          of its values in BINS equal parts of minimum … maximum
    """

    name: str
    role: str
    layer: str
    format: str
    range: str
    one_scale: bool
    minimum: float
    maximum: float
    median: float
    p999: float
    step: float
    sqnr_db: float
    low: float | None = None
    high: float | None = None
    clipped: float | None = None
    clipping_noise: float | None = None
    below_zero: float | None = None
    codes_below_zero: int | None = None
    growth: float | None = None
    channel_ranges: tuple[float, float, float] | None = None
    dead_channels: int = 0
    channels: int = 0
    cost: float | None = None
    solver: str = ""
    bits: int = 8
    counts: tuple[int, ...] = ()

    @property
    def alone_db(self) -> float | None:
        """SQNR of the outputs where this tensor alone is quantized, to first order."""
        return None if self.cost is None else decibels(self.cost)

    @property
    def channel_spread(self) -> float | None:
        """Largest channel over the median one."""
        return None if self.channel_ranges is None else self.channel_ranges[2] / self.channel_ranges[1]

    @property
    def tail(self) -> float:
        """Largest magnitude over the 99.9th percentile."""
        return max(-self.minimum, self.maximum) / self.p999 if self.p999 else 1.0


@dataclass(frozen=True)
class Walked:
    """What one walk of the exact network shows: shapes of values, and the largest magnitude of each channel."""

    shapes: Mapping[str, tuple[int, ...]]
    channels: Mapping[str, Tensor]


def walk_once(network: Network, batch: Batch) -> Walked:
    """Shapes of all values, and channels of those that are quantized, over one batch in float."""
    walk, shapes, channels = Walk(network.module, tensors(network, batch), exact=True), {}, {}
    for node in in_step(walk):
        x = walk.compute(node)
        if not isinstance(x, Tensor):
            continue
        if "value" in node.meta:
            shapes[str(node.meta["value"])] = tuple(x.shape)
        value = node.meta.get("quantized_value")
        if value is not None and network.placement.sites[value].role == "activation" and x.dim() > 1 and x.numel():
            axis = 1 if x.dim() > 3 else -1
            channels[value] = x.abs().movedim(axis, 0).flatten(1).amax(1)
    return Walked(shapes, channels)


def growth(network: Network, batches: Sequence[Batch]) -> dict[str, float]:
    """Activation group → how far its range moves from the first half of these batches to all, in parts of its width."""
    if len(batches) < 2:
        return {}
    static = {name: q for name, q in network.activations().items() if not q.dynamic}
    whole = {name: q.statistics for name, q in static.items()}
    bounds: list[dict[str, tuple[float, float]]] = []
    try:
        for quantizer in static.values():
            quantizer.statistics = Histogram()
        for part in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
            with network.mode("observe", list(static.values())):
                for batch in part:
                    forward(network, batch)
            bounds.append({name: _bounds(q) for name, q in static.items() if q.statistics.count})
    finally:
        for name, quantizer in static.items():
            quantizer.statistics = whole[name]
    half, all_of_them = bounds
    moved = {}
    for name, (low, high) in half.items():
        lowest, highest = all_of_them[name]
        moved[name] = max(abs(low - lowest), abs(high - highest)) / max(highest - lowest, 1e-30)
    return moved


def _bounds(quantizer: FakeQuant) -> tuple[float, float]:
    low, high = quantizer.spec.range.bounds(quantizer.statistics, quantizer.format)
    return float(low), float(high)


def tensor_facts(
    network: Network, costs: Mapping[str, float], walked: Walked, moved: Mapping[str, float]
) -> list[TensorFacts]:
    """Of every quantized weight, constant and activation; those that share a scale once, under the first's name."""
    found, done = [], set()
    for site in network.placement.sites.values():
        quantizer = network.quantizers[site.value]
        if site.role == "bias" or id(quantizer) in done:
            continue
        done.add(id(quantizer))
        if isinstance(quantizer, FakeQuant):
            found.append(_activation(site, quantizer, costs.get(site.group), walked, moved.get(site.group)))
        elif isinstance(quantizer, WeightQuant) and quantizer.stored is not None:
            found.append(_weight(network, site, quantizer, costs.get(site.value)))
    return found


def _activation(site: Site, q: FakeQuant, cost: float | None, walked: Walked, moved: float | None) -> TensorFacts:
    statistics = q.statistics
    values, weights = (t.reshape(-1).double().numpy() for t in statistics.points())
    low, high = (-inf, inf) if q.dynamic else q.limits()
    rounded = values if q.dynamic else q.rounded(torch.from_numpy(values).float()).double().numpy()
    noise = weights * (values - rounded) ** 2
    # A bucket stands for numbers 0.2 % apart, whose codes are not those of its middle: their noise is step² / 12.
    step = 0.0 if q.dynamic else float(q.scale)
    inside = (values >= low - step / 2) & (values <= high + step / 2)
    coarse = inside & (np.abs(values) * statistics.resolution > step) & (values != 0)
    noise[coarse] = weights[coarse] * step**2 / 12
    total, count = float(noise.sum()), max(float(weights.sum()), 1.0)
    power = float((weights * values**2).sum())
    static: dict[str, Any] = {} if q.dynamic else {
        "low": low, "high": high, "growth": moved, "codes_below_zero": round(-low / step) if step else 0,
        "clipped": float(weights[~inside].sum()) / count,
        "clipping_noise": float(noise[~inside].sum()) / max(total, 1e-30),
    }  # fmt: skip
    return TensorFacts(
        name=site.value, role="activation", layer=site.layer, format=describe_format(q.format),
        range=range_words(q.spec.range), one_scale=q.format.block == TENSOR, bits=q.format.grid.bits,
        minimum=float(statistics.minimum.min()), maximum=float(statistics.maximum.max()),
        **_magnitudes(values, weights), step=step, sqnr_db=decibels(total, power),
        below_zero=float(weights[values < 0].sum()) / count, cost=cost, counts=_counts(values, weights),
        **_channels(walked.channels.get(site.value)), **static,
    )  # fmt: skip


def _weight(network: Network, site: Site, q: WeightQuant, cost: float | None) -> TensorFacts:
    assert q.stored is not None
    weight = network.parameter(site.value).detach().float()
    rounded = torch.as_tensor(q.stored.dequantize()).float()
    values = weight.reshape(-1).double().numpy()
    one_scale = prod(q.stored.tiles) == 1
    node = next(n for n in network.program.graph if n.name == site.layer)
    axis = next((layer.output_axis for layer in layers_of(node) if layer.value.name == site.value), None)
    largest = None if axis is None or weight.dim() < 2 else weight.abs().movedim(axis, 0).flatten(1).amax(1)
    return TensorFacts(
        name=site.value, role=site.role, layer=site.layer, format=describe_format(q.stored.format),
        range=range_words(q.spec.range), one_scale=one_scale, solver=q.spec.solve,
        bits=q.stored.format.grid.bits,
        minimum=float(values.min(initial=0)), maximum=float(values.max(initial=0)),
        **_magnitudes(values), step=float(q.scale.max()) if one_scale else 0.0,
        sqnr_db=decibels(float((weight - rounded).square().sum()), float(weight.square().sum())),
        cost=cost, counts=_counts(values), **_channels(largest),
    )  # fmt: skip


def _channels(largest: Tensor | None) -> dict[str, Any]:
    """channel_ranges, dead_channels and channels out of the largest magnitude of each channel."""
    if largest is None or not len(largest):
        return {}
    alive = largest[largest > NEARLY_ZERO * largest.max()]
    ranges = tuple(map(float, (alive.min(), alive.median(), alive.max()))) if len(alive) else None
    return {"channel_ranges": ranges, "dead_channels": len(largest) - len(alive), "channels": len(largest)}


def _magnitudes(values: np.ndarray, weights: np.ndarray | None = None) -> dict[str, Any]:
    """median and p999 of the magnitudes that are not 0; 0 where there is none."""
    large, shares = np.abs(values[values != 0]), [0.5, 0.999]
    if not large.size:
        return {"median": 0.0, "p999": 0.0}
    if weights is None:
        return dict(zip(("median", "p999"), np.quantile(large, shares).tolist(), strict=True))
    order = np.argsort(large)
    below = np.cumsum(weights[values != 0][order])
    found = large[order][np.searchsorted(below, np.array(shares) * below[-1])]
    return dict(zip(("median", "p999"), found.tolist(), strict=True))


def _counts(values: np.ndarray, weights: np.ndarray | None = None) -> tuple[int, ...]:
    return tuple(np.histogram(values, BINS, weights=weights)[0].round().astype(int).tolist()) if values.size else ()
