"""A diagnosis as one HTML page that needs no network, and as a few lines in the terminal."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

import lowbit
from lowbit.report.charts import Axis, bars, columns, figure, histogram, line, spans
from lowbit.report.table import table
from lowbit.report.words import bytes_text, db_text, times_text

if TYPE_CHECKING:
    from lowbit.flows.compare import Comparison
    from lowbit.flows.diagnose import Diagnosis, LayerRow
    from lowbit.flows.tensor_facts import TensorFacts

COLOURS = {"keeps": "good", "nearly keeps": "fair", "does not keep": "bad"}
WORST = 6  # tensors that are drawn
ROWS = 12  # of a list of bars


def page(found: "Diagnosis") -> str:
    """The whole page."""
    style = files("lowbit.report").joinpath("diagnosis.css").read_text(encoding="utf-8")
    title = f"lowbit diagnose: {found.source}"
    parts = [
        _head(found), _findings(found), _network(found), _tensors(found), _spread(found), _shifts(found), _cost(found),
        _latency(found), _float(found), _tries(found.tries), _layers(found), _done(found),
    ]  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{style}</style></head><body>\n" + "\n".join(filter(None, parts)) + "\n</body></html>\n"
    )


def summary(found: "Diagnosis") -> RenderableType:
    """The verdict, and what costs most."""
    rows = [(_share(f.share), f.cause, f.tensor, f.told, f.remedy) for f in found.findings[:ROWS]]
    head = (">of the error", "cause", "tensor", "measured", "remedy")
    style = {"good": "bold green", "fair": "bold yellow"}.get(COLOURS[found.comparison.kept], "bold red")
    return Group(Text(found.verdict, style=style), "", table(head, rows))


def _head(found: "Diagnosis") -> str:
    c, (before, after) = found.comparison, found.operations
    on = f"{c.samples:,} test samples" if found.on_test_data else f"{c.samples:,} of its calibration samples"
    tiles = []
    if c.metric is not None:
        tiles.append((c.metric, c.metric_text(c.candidate.metric), f"float {c.metric_text(c.reference.metric)}"))
    if c.agreement is not None:
        tiles.append(("same answer as float", f"{100 * c.agreement:.1f} %", on))
    worst = min(c.outputs, key=lambda output: output.sqnr_db)
    tiles.append(("SQNR of the outputs", db_text(worst.sqnr_db), f"cosine {worst.cosine:.4f}"))
    size = bytes_text(c.candidate.network_bytes)
    tiles.append(("bytes", size, f"float {bytes_text(c.reference.network_bytes)}, {times_text(c.times_smaller)}"))
    if c.candidate.latency is not None and c.reference.latency is not None:
        times = (f"{side.median_ms:.3g} ms" for side in (c.candidate.latency, c.reference.latency))
        tiles.append((f"latency, {c.threads_text}", next(times), f"float {next(times)}, {c.faster_text}"))
    if before.energy_pj:
        ratio = times_text(before.energy_pj / max(after.energy_pj, 1e-9), "less", "more", "same")
        tiles.append(("energy, estimated", _joules(after.energy_pj), f"float {_joules(before.energy_pj)}, {ratio}"))
    listed = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in tiles
    )
    head = f"{found.source} · calibrated on {found.samples:,} samples · judged on {on} · lowbit {lowbit.__version__}"
    return (
        f'<h1>{escape(head)}</h1><p class="verdict"><span class="{COLOURS[c.kept]}">{escape(_short(c))}</span> '
        f'{escape(_why(found))}</p><dl class="tiles">{listed}</dl>'
    )


def _short(c: "Comparison") -> str:
    kept = {"keeps": "Keeps", "nearly keeps": "Nearly keeps", "does not keep": "Does not keep"}[c.kept]
    facts = [f"{c.metric} {c.change_text}"] if c.metric_change is not None else []
    facts += [f"same answer on {100 * c.agreement:.1f} %"] if c.agreement is not None else []
    facts = facts or [f"SQNR {db_text(min(output.sqnr_db for output in c.outputs))}"]
    return f"{kept} the job: {', '.join(facts)}, {times_text(c.times_smaller)}."


def _why(found: "Diagnosis") -> str:
    main = next((f for f in found.findings if f.share or f.cause == "preprocessing"), None)
    if main is None:
        return "No single tensor stands out."
    if main.share is None:
        return f"First: {main.told}."
    of = f" of '{main.tensor}'" if main.tensor else ""
    return f"The largest part of the error, {_share(main.share)}, is the {main.cause}{of}."


def _findings(found: "Diagnosis") -> str:
    facts = {x.name: x for x in found.tensors}
    cards = []
    for f in found.findings:
        gain = facts[f.tensor].without_db if f.tensor in facts else None
        gained = "" if gain is None else (
            f'<p class="quiet">In float it would leave the outputs at {db_text(gain)}; with all quantized they are at '
            f"{db_text(found.measured_db)} (simulated).</p>"
        )  # fmt: skip
        share = "" if f.share is None else f'<span class="chip">{_share(f.share)} of the error</span> '
        name = f" <code>{escape(f.tensor)}</code>" if f.tensor else ""
        code = (
            f"<details><summary>lines for the recipe</summary><pre>{escape(f.recipe.strip())}</pre></details>"
            if f.recipe
            else ""
        )
        cards.append(
            f'<div class="card"><h3>{share}{escape(f.cause.capitalize())}{name}</h3><p>{escape(_sentence(f.told))} '
            f"<b>{escape(f.remedy)}</b></p>{gained}{code}</div>"
        )
    if not cards:
        return "<h2>What to do</h2><p>Nothing: no tensor makes a large part of the error, and no cause was found.</p>"
    lead = (
        "The network keeps its job: nothing has to be done. What costs most, should more be wanted:"
        if found.comparison.kept == "keeps"
        else "Causes, the most costly first."
    )
    return f'<h2>What to do</h2><p>{lead}</p><div class="cards findings">{"".join(cards)}</div>'


def _network(found: "Diagnosis") -> str:
    rows, facts = found.layers, {x.name: x for x in found.tensors}
    total = sum(x.cost or 0 for x in found.tensors) or 1.0
    if not rows:
        return ""
    middle = [(i + 0.5) / len(rows) for i in range(len(rows))]
    known = [(x, r) for x, r in zip(middle, rows, strict=True) if _finite(r.accumulated_db)]
    own = {
        kind: [(x, facts[name].sqnr_db, f"{name}: rounded at {facts[name].sqnr_db:.1f} dB")
               for x, r in zip(middle, rows, strict=True) if (name := getattr(r, kind)) in facts
               and isfinite(facts[name].sqnr_db)]
        for kind in ("activation", "weight")
    }  # fmt: skip
    levels = [float(r.accumulated_db or 0) for _, r in known] + [y for points in own.values() for _, y, _ in points]
    axis = _nice(levels)
    ticks = [(axis.at(y), f"{y:.0f} dB") for y in _ticks(axis)]
    ends = [(0.0, rows[0].name), (1.0, rows[-1].name)]
    shapes = "".join(line([(x, axis.at(y), words) for x, y, words in points], kind) for kind, points in own.items())
    shapes += line([(x, axis.at(float(r.accumulated_db or 0)), f"{r.name}: {db_text(r.accumulated_db or 0)}")
                    for x, r in known], "total")  # fmt: skip
    shares = [
        [(x.cost / total, kind, f"{name}: {_share(x.cost / total)}") for kind in ("weight", "activation")
         if (name := getattr(r, kind)) in facts and (x := facts[name]).cost and _owns(found, r, kind)]
        for r in rows
    ]  # fmt: skip
    tallest = max((sum(h for h, *_ in column) for column in shares), default=0) or 1.0
    scaled = [[(h / tallest, kind, words) for h, kind, words in column] for column in shares]
    best = sorted(((sum(h for h, *_ in c), r.name) for c, r in zip(shares, rows, strict=True)), reverse=True)[:3]
    told = ", ".join(f"{name} {_share(share)}" for share, name in best if share)
    return (
        "<h2>Error along the network</h2>"
        "<p>Signal-to-noise ratio of each layer's output in the quantized file, beside the float network on the same "
        "samples, and of each tensor's own rounding. Higher is better; 6 dB are one bit.</p>"
        + _legend(
            ("total", "all errors up to here"),
            ("activation", "own rounding, activation"),
            ("weight", "own rounding, weight"),
        )
        + figure(shapes, "Signal-to-noise ratio along the network", ticks, ends)
        + "<p>Share of the outputs' error that each tensor's rounding makes alone, estimated to the first order. "
        f"Together they come to {db_text(found.estimated_db)}; simulated with all of them it is "
        f"{db_text(found.measured_db)}. Most: {escape(told)}.</p>"
        + _legend(("activation", "activation"), ("weight", "weight"))
        + figure(columns(scaled), "Share of the error by layer", [(1.0, _share(tallest)), (0.0, "0")], ends)
    )


def _owns(found: "Diagnosis", row: "LayerRow", kind: str) -> bool:
    """Whether a tensor that several layers share is this one's to show: the first's."""
    return next(r for r in found.layers if getattr(r, kind) == getattr(row, kind)) is row


def _tensors(found: "Diagnosis") -> str:
    worst = sorted((x for x in found.tensors if x.counts and x.cost), key=lambda x: -(x.cost or 0))[:WORST]
    if not worst:
        return ""
    total = sum(x.cost or 0 for x in found.tensors) or 1.0
    cards = []
    for x in worst:
        low, high = min(x.minimum, x.low or x.minimum), max(x.maximum, x.high or x.maximum)
        axis = Axis(x.minimum, x.maximum)
        limits = None if x.low is None or x.high is None else (x.low, x.high)
        inside = limits and (max(x.low or 0, low), min(x.high or 0, high))
        chart = figure(histogram(x.counts, axis, inside), f"Histogram of {x.name}", [],
                       [(0.0, f"{x.minimum:.3g}"), (1.0, f"{x.maximum:.3g}")])  # fmt: skip
        facts = [f"{_share((x.cost or 0) / total)} of the error", f"own rounding {db_text(x.sqnr_db)}"]
        if limits:
            facts.append(f"range {limits[0]:.3g} … {limits[1]:.3g} ({x.range})")
        if x.clipped is not None:
            facts.append(f"{_share(x.clipped)} clipped")
        cards.append(
            f'<div class="card small"><h3><code>{escape(x.name)}</code></h3><p class="quiet">{x.role}, '
            f'{escape(x.format)}</p>{chart}<p class="quiet">{escape(" · ".join(facts))}</p></div>'
        )
    return (
        "<h2>The costliest tensors</h2><p>Values over the calibration data; heights are logarithmic. Dashed lines are "
        "the ends of the range; what lies outside is clipped.</p>"
        + _legend(("activation", "in range"), ("bad", "clipped"))
        + f'<div class="cards">{"".join(cards)}</div>'
    )


def _spread(found: "Diagnosis") -> str:
    known = [x for x in found.tensors if x.role == "weight" and x.channel_ranges and x.channels > 1]
    worst = sorted(known, key=lambda x: -(x.channel_spread or 0))[:ROWS]
    if not worst:
        return ""
    scales = Counter(x.one_scale for x in known)
    told = f"{scales[False]} of {len(known)} have a scale for each channel or block, {scales[True]} one for all."
    rows = [(x.name, *(x.channel_ranges or (1, 1, 1)), f"{x.channel_spread:.1f}×") for x in worst]
    return (
        "<h2>Channel spread of weights</h2><p>Largest magnitude of each output channel, from the smallest channel to "
        "the largest on a logarithmic axis; the mark is the median. The number is the largest over the median. Under "
        f"one scale for all, small channels get few codes. Of these weights {told}</p>" + spans(rows)
    )


def _shifts(found: "Diagnosis") -> str:
    if not found.shifts:
        return ""
    rows = [_shift_row("none", found.comparison, "")]
    rows += [_shift_row(s.shift, s.told, s.problem) for s in found.shifts]
    metric = found.comparison.metric
    heads = ["shift", *([f">{metric}, float", f">{metric}, quantized", ">difference"] if metric else []),
             ">same answer", ">SQNR"]  # fmt: skip
    cells = [row if metric else [row[0], *row[4:]] for row in rows]
    return (
        "<h2>Off its distribution</h2><p>Both networks on the same shifted samples: noise and brightness in standard "
        "deviations of the inputs, blur in pixels, contrast and length as factors. A quantized network that "
        "generalised worse would lose more here than on clean samples.</p>" + _table(heads, cells)
    )


def _shift_row(name: str, c: "Comparison | None", problem: str) -> list[str]:
    if c is None:
        return [f"{name}: {problem}", "", "", "", "", ""]
    same = "" if c.agreement is None else f"{100 * c.agreement:.1f} %"
    values = [c.metric_text(c.reference.metric), c.metric_text(c.candidate.metric)]
    change = c.change_text if c.metric_change is not None else ""
    return [f"{name} ({c.samples:,} samples)", *values, change, same, db_text(min(o.sqnr_db for o in c.outputs))]


def _cost(found: "Diagnosis") -> str:
    before, after = found.operations
    rows: list[Sequence[str]] = [
        ["multiply-adds of a sample", f"{before.multiply_adds:,}", f"{after.multiply_adds:,}",
         f"{_share(after.integer / max(1, after.multiply_adds))} of them in integers"],
        ["bit operations", f"{before.bit_operations:.3g}", f"{after.bit_operations:.3g}",
         times_text(before.bit_operations / max(1, after.bit_operations), "fewer", "more", "same")],
        ["energy of multiply-adds", _joules(before.compute_pj), _joules(after.compute_pj), ""],
        ["energy of reading weights once", _joules(before.weights_pj), _joules(after.weights_pj), ""],
    ]  # fmt: skip
    kinds = [(kind, float(n), bytes_text(n)) for kind, n in found.bytes_by_kind.items()][:ROWS]
    return (
        "<h2>What it costs to run</h2>" + _table(["", ">float", ">quantized", ""], rows)
        + '<p class="quiet">Bit operations: multiply-adds × bits of the one × bits of the other. Energy: an estimate '
        "from Horowitz 2014 (45 nm): 4.6 pJ for a multiply-add in float32, 0.3 pJ in int8, at least 1.3 nJ for 64 bits "
        "out of DRAM; activations are not counted.</p><h3>Bytes of the stored tensors</h3>" + bars(kinds)
    )  # fmt: skip


def _latency(found: "Diagnosis") -> str:
    by_kind: list[Counter[str]] = []
    for times in found.times:
        by_kind.append(Counter())
        for node in times:
            by_kind[-1][node.operator] += round(node.microseconds * 1000)
    if not any(by_kind):
        return ""
    lists = [
        f'<div class="card"><h3>{name}</h3>'
        + bars([(op, ns, f"{ns / 1000:,.0f} µs") for op, ns in kinds.most_common(ROWS)], colour) + "</div>"
        for name, kinds, colour in zip(("float", "quantized"), by_kind, ("weight", "activation"), strict=True)
    ]  # fmt: skip
    return (
        "<h2>Latency by operator</h2><p>Time in each kind of kernel, of one call of one sample on one thread, as "
        f'onnxruntime\'s profile says; profiling itself slows it.</p><div class="cards">{"".join(lists)}</div>'
    )


def _float(found: "Diagnosis") -> str:
    if not found.left_in_float:
        return "<h2>What stayed in float</h2><p>Nothing.</p>"
    reasons: dict[str, list[Mapping[str, Any]]] = {}
    for row in found.left_in_float:
        reasons.setdefault(str(row.get("reason") or "unknown"), []).append(row)
    rows = [
        [f"{len(tensors):,}", bytes_text(sum(int(t.get("bytes") or 0) for t in tensors)), reason,
         ", ".join(str(t.get("layer") or t["tensor"]) for t in tensors[:4]) + (" …" if len(tensors) > 4 else "")]
        for reason, tensors in sorted(reasons.items(), key=lambda pair: -len(pair[1]))
    ]  # fmt: skip
    return "<h2>What stayed in float, and why</h2>" + _table([">tensors", ">bytes", "reason", "in"], rows, wide=(2, 3))


def _tries(tries: Sequence[Mapping[str, Any]]) -> str:
    if not tries:
        return ""
    heads = list(dict.fromkeys(key for row in tries for key in row))
    cells = [[_cell(key, row.get(key)) for key in heads] for row in tries]
    return "<h2>What was tried</h2>" + _table(["what" if h == "what" else f">{h}" for h in heads], cells)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "bytes":
        return bytes_text(int(value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _layers(found: "Diagnosis") -> str:
    facts, total = {x.name: x for x in found.tensors}, sum(x.cost or 0 for x in found.tensors) or 1.0
    cells = []
    for r in found.layers:
        weight, activation = (facts.get(name or "") for name in (r.weight, r.activation))
        cells.append(
            [r.name, r.operator, *_two(weight, total), *_two(activation, total), _db(r.accumulated_db),
             f"{r.multiply_adds:,}" if r.multiply_adds else "",
             "×".join(map(str, r.bits)) if r.bits else ("float" if r.multiply_adds else "")]
        )  # fmt: skip
    heads = ["layer", "operator", ">weight, own", ">alone", ">activation, own", ">alone", ">all up to here",
             ">multiply-adds", ">bits"]  # fmt: skip
    return (
        "<h2>All layers</h2><p>Own: SQNR of the tensor's own rounding. Alone: SQNR of the network's outputs if only "
        "this tensor were rounded, to the first order. All up to here: SQNR of what the layer makes in the file.</p>"
        f"<details><summary>{len(cells)} rows</summary>{_table(heads, cells)}</details>"
    )


def _two(x: "TensorFacts | None", total: float) -> tuple[str, str]:
    return ("", "") if x is None else (_db(x.sqnr_db), _db(x.alone_db))


def _done(found: "Diagnosis") -> str:
    steps = "".join(f"<li>{escape(step)}</li>" for step in found.steps)
    return (
        "<h2>What was done</h2>" + (f"<ul>{steps}</ul>" if steps else "")
        + f"<details><summary>the recipe</summary><pre>{escape(found.recipe.strip())}</pre></details>"
    )  # fmt: skip


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], wide: Sequence[int] = ()) -> str:
    """A table that scrolls by itself where the page is narrow; a heading that starts with > stands over numbers."""
    kinds = [' class="n"' if h.startswith(">") else ' class="wide"' if i in wide else "" for i, h in enumerate(heads)]
    head = "".join(f"<th{k}>{escape(h.removeprefix('>'))}</th>" for h, k in zip(heads, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{escape(c)}</td>" for c, k in zip(row, kinds, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _legend(*entries: tuple[str, str]) -> str:
    return '<ul class="legend">' + "".join(f'<li><i class="{k}"></i>{escape(w)}</li>' for k, w in entries) + "</ul>"


def _nice(levels: Sequence[float]) -> Axis:
    """An axis in whole tens around the levels."""
    low, high = min(levels, default=0.0), max(levels, default=10.0)
    return Axis(10 * (low // 10), max(10 * -(-high // 10), 10 * (low // 10) + 10))


def _ticks(axis: Axis) -> list[float]:
    step = 10 if axis.high - axis.low <= 60 else 20
    return [axis.low + step * i for i in range(int((axis.high - axis.low) // step) + 1)]


def _finite(value: float | None) -> bool:
    return value is not None and isfinite(value)


def _db(value: float | None) -> str:
    return "" if value is None else "equal" if value == inf else f"{value:.1f} dB"


def _share(share: float | None) -> str:
    if share is None:
        return ""
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.5 else f"{value:.2g} %"


def _joules(picojoules: float) -> str:
    return f"{picojoules / 1e9:.3g} mJ" if picojoules >= 1e9 else f"{picojoules / 1e6:.3g} µJ"


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."
