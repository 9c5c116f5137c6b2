"""The charts of a diagnosis: error along the network, the costliest tensors, channel spread, bytes, energy, latency."""

from collections import Counter
from collections.abc import Sequence
from html import escape
from math import isfinite
from typing import TYPE_CHECKING

from lowbit.report.charts import Axis, bars, columns, figure, histogram, html_table, legend, line, spans
from lowbit.report.words import bytes_text, db_text, joules_text, share_text, times_text

if TYPE_CHECKING:
    from lowbit.flows.diagnosis import Diagnosis

WORST = 6  # tensors that are drawn
ROWS = 12  # of a list of bars
ROUGH_DB = 6.0  # between estimate and measurement: the first order does not hold


def network(found: "Diagnosis") -> str:
    """SQNR of each layer's output and each tensor's own rounding; below, the share of the outputs' error."""
    facts = {x.name: x for x in found.tensors}
    rows = [(r, (i + 0.5) / len(found.layers)) for i, r in enumerate(found.layers)]
    made = [
        (x, r.accumulated_db, r.name) for r, x in rows if r.accumulated_db is not None and isfinite(r.accumulated_db)
    ]
    own = {
        kind: [(x, facts[name].sqnr_db, name) for r, x in rows if (name := getattr(r, kind)) in facts]
        for kind in ("activation", "weight")
    }
    own = {kind: [point for point in points if isfinite(point[1])] for kind, points in own.items()}
    axis = _tens([y for points in (made, *own.values()) for _, y, _ in points])
    shapes = "".join(
        line([(x, axis.at(y), f"{name}: {db_text(y)}") for x, y, name in points], kind)
        for kind, points in (*own.items(), ("total", made))
    )
    step = 10 if axis.high - axis.low <= 60 else 20
    ticks = [(axis.at(y), f"{y:.0f} dB") for y in range(int(axis.low), int(axis.high) + 1, step)]
    ends = [(0.0, found.layers[0].name), (1.0, found.layers[-1].name)]
    rough = abs(found.estimated_db - found.measured_db) > ROUGH_DB
    doubt = " They differ, so take these shares as an order, not as amounts." if rough else ""
    own_words = {"activation": "own rounding, activation", "weight": "own rounding, weight"}
    return (
        "<h2>Error along the network</h2><p>Signal-to-noise ratio (SQNR) of what each layer makes in the quantized "
        "file, beside the float network on the same samples, and of each tensor's own rounding. Higher is better; "
        f"6 dB are one bit.</p>{legend(total='all errors up to here', **own_words)}"
        f"{figure(shapes, 'Signal-to-noise ratio along the network', ticks, ends)}"
        "<p>Share of the outputs' error that each tensor's rounding makes alone, estimated to the first order. "
        f"Together they come to {db_text(found.estimated_db)}; simulated with all of them it is "
        f"{db_text(found.measured_db)}.{doubt}</p>{legend(activation='activation', weight='weight')}"
        f"{_shares(found, ends)}"
    )


def _shares(found: "Diagnosis", ends: Sequence[tuple[float, str]]) -> str:
    """A column for each layer; a tensor that several share stands at the first of them."""
    facts, total = {x.name: x for x in found.tensors}, sum(x.cost or 0 for x in found.tensors) or 1.0
    drawn: set[str] = set()
    parts: list[list[tuple[float, str, str]]] = []
    for r in found.layers:
        parts.append([])
        for kind, name in (("weight", r.weight), ("activation", r.activation)):
            cost = facts[name].cost if name in facts and name not in drawn else None
            if name is not None and cost:
                parts[-1].append((cost / total, kind, f"{name}: {share_text(cost / total)}"))
                drawn.add(name)
    tallest = max((sum(height for height, *_ in part) for part in parts), default=0) or 1.0
    scaled = [[(height / tallest, kind, words) for height, kind, words in part] for part in parts]
    return figure(columns(scaled), "Share of the error by layer", [(1.0, share_text(tallest)), (0.0, "0")], ends)


def tensors(found: "Diagnosis") -> str:
    """Histograms of the costliest tensors, with their ranges."""
    worst = sorted((x for x in found.tensors if x.counts and x.cost), key=lambda x: -(x.cost or 0))[:WORST]
    total = sum(x.cost or 0 for x in found.tensors) or 1.0
    cards = []
    for x in worst:
        axis, ends = Axis(x.minimum, x.maximum), [(0.0, _number(x.minimum)), (1.0, _number(x.maximum))]
        facts = [f"{share_text((x.cost or 0) / total)} of the error", f"own rounding {db_text(x.sqnr_db)}"]
        limits = None
        if x.low is not None and x.high is not None:
            limits = max(x.low, x.minimum), min(x.high, x.maximum)
            facts += [f"range {_number(x.low)} … {_number(x.high)} ({x.range})", f"{share_text(x.clipped)} clipped"]
        cards.append(
            f'<div class="card small"><h3><code>{escape(x.name)}</code></h3><p class="quiet">{x.role}, '
            f"{escape(x.format)}</p>{figure(histogram(x.counts, axis, limits), f'Histogram of {x.name}', [], ends)}"
            f'<p class="quiet">{escape(" · ".join(facts))}</p></div>'
        )
    return (
        "<h2>The costliest tensors</h2><p>How often each value occurs over the calibration data; heights are "
        "logarithmic. Dashed lines are the ends of the range: what lies outside is clipped.</p>"
        f'{legend(activation="in range", bad="clipped")}<div class="cards">{"".join(cards)}</div>'
    ) if cards else ""  # fmt: skip


def spread(found: "Diagnosis") -> str:
    """Output channels of weights, smallest to largest."""
    known = [x for x in found.tensors if x.role == "weight" and x.channel_ranges and x.channels > 1]
    worst = sorted(known, key=lambda x: -(x.channel_spread or 0))[:ROWS]
    rows = [(x.name, *(x.channel_ranges or (1, 1, 1)), f"{x.channel_spread:.3g}×") for x in worst]
    one = sum(x.one_scale for x in known)
    return (
        "<h2>Channel spread of weights</h2><p>Largest magnitude of each output channel, from the smallest channel to "
        "the largest; the mark is the median, the number is the largest over the median. Under one scale for all, "
        f"small channels get few codes: {one} of these {len(known)} weights have one scale, the others one for each "
        f"channel or block.</p>{spans(rows)}"
    ) if rows else ""  # fmt: skip


def costs(found: "Diagnosis") -> str:
    """Multiply-adds, bit operations, energy; bytes by kind."""
    before, after = found.operations
    rows = [
        ["multiply-adds of a sample", f"{before.multiply_adds:,}", f"{after.multiply_adds:,}",
         f"{share_text(after.integer / max(1, after.multiply_adds))} in integers"],
        ["bit operations", _billions(before.bit_operations), _billions(after.bit_operations),
         times_text(before.bit_operations / max(1, after.bit_operations), "fewer", "more", "same")],
        ["energy of multiply-adds", joules_text(before.compute_pj), joules_text(after.compute_pj),
         times_text(before.compute_pj / max(1e-9, after.compute_pj), "less", "more", "same")],
        ["energy of reading the weights once", joules_text(before.weights_pj), joules_text(after.weights_pj),
         times_text(before.weights_pj / max(1e-9, after.weights_pj), "less", "more", "same")],
    ]  # fmt: skip
    kinds = [(kind, float(count), bytes_text(count)) for kind, count in found.bytes_by_kind.items()][:ROWS]
    return (
        f"<h2>What it costs to run</h2>{html_table(['', '>float', '>quantized', ''], rows)}"
        '<p class="quiet">Bit operations: multiply-adds × bits of the one × bits of the other. Energy is an estimate '
        "from Horowitz 2014 (45 nm): 4.6 pJ for a multiply-add in float32, 0.3 pJ in int8, 1.3 nJ for 64 bits out of "
        f"DRAM. Moving activations is not counted.</p><h3>Bytes of the stored tensors</h3>{bars(kinds)}"
    )


def latency(found: "Diagnosis") -> str:
    """Time by kind of kernel, of both networks."""
    kinds: list[Counter[str]] = [Counter(), Counter()]
    for counter, times in zip(kinds, found.times, strict=True):
        for node in times:
            counter[node.operator] += round(1000 * node.microseconds)  # ns
    longest = max((ns for counter in kinds for ns in counter.values()), default=0)
    cards = "".join(
        f'<div class="card"><h3>{name}, {counter.total() / 1000:,.0f} µs</h3>'
        + bars([(op, ns, f"{ns / 1000:,.0f} µs") for op, ns in counter.most_common(ROWS)], colour, longest)
        + "</div>"
        for name, colour, counter in zip(("float", "quantized"), ("weight", "activation"), kinds, strict=True)
    )
    return (
        "<h2>Latency by operator</h2><p>Time in each kind of kernel, of one sample on one thread, in onnxruntime's own "
        f'profile; profiling itself takes some of it.</p><div class="cards pair">{cards}</div>'
    ) if longest else ""  # fmt: skip


def _billions(count: int) -> str:
    return f"{count / 1e9:,.3g} billion"


def _tens(levels: Sequence[float]) -> Axis:
    """An axis of whole tens around the levels."""
    low, high = 10 * (min(levels, default=0.0) // 10), -10 * (-max(levels, default=10.0) // 10)
    return Axis(low, max(high, low + 10))


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")
