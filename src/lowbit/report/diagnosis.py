"""A diagnosis as one HTML page that needs no network, and as a few lines in the terminal."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

import lowbit
from lowbit.report.charts import html_table
from lowbit.report.diagnosis_charts import costs, latency, network, spread, tensors
from lowbit.report.table import table
from lowbit.report.words import bytes_text, db_text, joules_text, share_text, times_text

if TYPE_CHECKING:
    from lowbit.flows.causes import Finding, Remedy
    from lowbit.flows.compare import Comparison
    from lowbit.flows.diagnosis import Diagnosis
    from lowbit.flows.tensor_facts import TensorFacts

COLOURS = {"keeps": "good", "nearly keeps": "fair", "does not keep": "bad"}


def page(found: "Diagnosis") -> str:
    """The whole page."""
    style = files("lowbit.report").joinpath("diagnosis.css").read_text(encoding="utf-8")
    sections = (_head, _findings, network, tensors, spread, _shifts, costs, latency, _float, _tries, _layers, _done)
    body = "\n".join(filter(None, (section(found) for section in sections)))
    body = re.sub(
        r"(?<=\d) (?=(dB|%|bit|B|MB|[µm]?[sJ])\b)", "\N{NO-BREAK SPACE}", body
    )  # a unit stays with its number
    title = f"{Path(found.source).name}: lowbit diagnose"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{style}</style></head><body>\n{body}\n</body></html>\n'
    )


def summary(found: "Diagnosis") -> RenderableType:
    """The verdict, and what costs most."""
    rows = [
        (*((share_text(f.share), f.cause, ", ".join(f.tensors[:1]), f.told) if not i else ("", "", "", "")), r.told,
         None if r.outputs_db is None else db_text(r.outputs_db))
        for f in found.findings for i, r in enumerate(f.remedies)
    ]  # fmt: skip
    head = (">of the error", "cause", "tensor", "measured", "remedy", ">outputs then")
    style = {"good": "bold green", "fair": "bold yellow"}.get(COLOURS[found.comparison.kept], "bold red")
    parts: list[RenderableType] = [Text(found.verdict, style=style)]
    if rows:
        parts += [f"outputs now, simulated: {db_text(found.measured_db)}", "", table(head, rows)]
    return Group(*parts)


def _head(found: "Diagnosis") -> str:
    c, (before, after) = found.comparison, found.operations
    on = f"{c.samples:,} {'test' if found.on_test_data else 'calibration'} samples"
    worst = min(c.outputs, key=lambda output: output.sqnr_db)
    tiles = [("SQNR of the outputs", db_text(worst.sqnr_db), f"cosine {worst.cosine:.4f}")]
    if c.agreement is not None:
        tiles.insert(0, ("same answer", f"{100 * c.agreement:.1f} %", "as the float network"))
    if c.metric is not None:
        tiles.insert(0, (c.metric, c.metric_text(c.candidate.metric), f"float {c.metric_text(c.reference.metric)}"))
    sizes = [bytes_text(side.network_bytes) for side in (c.candidate, c.reference)]
    tiles.append(("bytes", sizes[0], f"float {sizes[1]}, {times_text(c.times_smaller)}"))
    if c.candidate.latency is not None and c.reference.latency is not None:
        now, then = (f"{side.median_ms:.3g} ms" for side in (c.candidate.latency, c.reference.latency))
        tiles.append((f"latency, {c.threads_text}", now, f"float {then}, {c.faster_text}"))
    if before.energy_pj:
        less = times_text(before.energy_pj / max(after.energy_pj, 1e-9), "less", "more", "same")
        tiles.append(
            ("energy, estimated", joules_text(after.energy_pj), f"float {joules_text(before.energy_pj)}, {less}")
        )
    listed = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in tiles
    )
    kept, _, told = c.verdict.partition(": ")
    return (
        f'<p class="quiet">lowbit {lowbit.__version__} · {escape(found.recipe_name)} · calibrated on {found.samples:,} '
        f'samples, judged on {on}</p><h1><span class="{COLOURS[c.kept]}">{escape(kept)}</span>: {escape(told)} '
        f'{escape(found.main)}</h1><dl class="tiles">{listed}</dl>'
    )


def _findings(found: "Diagnosis") -> str:
    lead = "The network keeps its job: nothing has to be done. " if found.comparison.kept == "keeps" else ""
    if any(f.share for f in found.findings):
        lead += (
            "Causes, the most costly first. A share is the part of the outputs' squared error that these tensors make. "
            "Put the lines of a remedy behind the recipe at the end of this page."
        )
    else:
        lead += "No cause makes a large part of the error."
    cards = "".join(_card(f, found.measured_db) for f in found.findings)
    return f'<h2>What to do</h2><p>{lead}</p><div class="findings">{cards}</div>'


def _card(f: "Finding", now_db: float) -> str:
    share = "" if f.share is None else f'<span class="chip">{share_text(f.share)} of the error</span> '
    names = ", ".join(f"<code>{escape(name)}</code>" for name in f.tensors[:6])
    names += f" and {len(f.tensors) - 6} more" if len(f.tensors) > 6 else ""
    first = f"In <code>{escape(f.tensors[0])}</code>, " if len(f.tensors) > 1 else ""
    told = escape(f.told) if first else escape(f.told[:1].upper() + f.told[1:])
    remedies = "".join(_remedy(r, now_db) for r in f.remedies)
    return (
        f'<div class="card"><h3>{share}{escape(f.cause.capitalize())}</h3><p class="quiet">{names}</p>'
        f"<p>{first}{told}.</p>{remedies}</div>"
    )


def _remedy(r: "Remedy", now_db: float) -> str:
    gained = ""
    if r.outputs_db is not None:
        gained = f" Calibrated anew so: outputs at <b>{db_text(r.outputs_db)}</b>, now {db_text(now_db)}."
    lines = f"<details><summary>lines for the recipe</summary><pre>{escape(r.recipe.strip())}</pre></details>"
    return f"<p><b>{escape(r.told)}</b>{gained}</p>{lines if r.recipe else ''}"


def _shifts(found: "Diagnosis") -> str:
    if not found.shifts:
        return ""
    metric = found.comparison.metric
    heads = ["shift", f">{metric}, float", ">quantized", ">difference", ">same answer", ">SQNR"]
    rows = [_shift_row(s.shift, s.told, s.problem) for s in found.shifts]
    samples = max((s.told.samples for s in found.shifts if s.told), default=0)
    kept = range(6) if metric else (0, 4, 5)
    shown = html_table([heads[i] for i in kept], [[row[i] for i in kept] for row in rows])
    return (
        f"<h2>Off its distribution</h2><p>Both networks on the same {samples} samples, shifted: noise and brightness "
        "in standard deviations of the inputs, blur in pixels, contrast and length as factors. Where the quantized "
        f"network loses more than the float one, it generalises worse; ± is two standard deviations.</p>{shown}"
    )


def _shift_row(name: str, c: "Comparison | None", problem: str) -> list[str]:
    if c is None:
        return [f"{name}: {problem}", "", "", "", "", ""]
    same = "" if c.agreement is None else f"{100 * c.agreement:.1f} %"
    values = [c.metric_text(c.reference.metric), c.metric_text(c.candidate.metric)]
    change = c.change_text if c.metric_change is not None else ""
    if c.metric == "top1" and c.agreement is not None:  # only samples with another answer can change it
        change += f" ± {200 * sqrt((1 - c.agreement) / c.samples):.1f}"
    return [name, *values, change, same, db_text(min(o.sqnr_db for o in c.outputs))]


def _float(found: "Diagnosis") -> str:
    if not found.left_in_float:
        return "<h2>What stayed in float</h2><p>Nothing.</p>"
    reasons: dict[str, list[Mapping[str, Any]]] = {}
    for row in found.left_in_float:
        reasons.setdefault(str(row.get("reason") or "unknown"), []).append(row)
    rows = []
    for reason, members in sorted(reasons.items(), key=lambda pair: -len(pair[1])):
        layers = list(dict.fromkeys(str(t.get("layer") or t["tensor"]) for t in members))
        names = ", ".join(layers[:4]) + " …" * (len(layers) > 4)
        stored = sum(int(t.get("bytes") or 0) for t in members)
        rows.append([reason, f"{len(members):,}", bytes_text(stored), names])
    return "<h2>What stayed in float, and why</h2>" + html_table(["~reason", ">tensors", ">bytes", "~in"], rows)


def _tries(found: "Diagnosis") -> str:
    heads = list(dict.fromkeys(key for row in found.tries for key in row))
    if not heads:
        return ""
    rows = [[_cell(key, row.get(key)) for key in heads] for row in found.tries]
    return "<h2>What was tried</h2>" + html_table(["what" if h == "what" else f">{h}" for h in heads], rows)


def _cell(key: str, value: Any) -> str:
    if key == "bytes" and value is not None:
        return bytes_text(int(value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _layers(found: "Diagnosis") -> str:
    facts, rows = {x.name: x for x in found.tensors}, []
    for r in found.layers:
        bits = "×".join(map(str, r.bits)) if r.bits else "float" if r.multiply_adds else ""
        made = "" if r.accumulated_db is None else db_text(r.accumulated_db)
        pairs = [*_own_and_alone(facts.get(r.weight or "")), *_own_and_alone(facts.get(r.activation or ""))]
        rows.append([r.name, r.operator, *pairs, made, f"{r.multiply_adds:,}" if r.multiply_adds else "", bits])
    heads = [">weight, own", ">alone", ">activation, own", ">alone", ">all up to here", ">multiply-adds", ">bits"]
    return (
        "<h2>All layers</h2><p>Own: SQNR of the tensor's own rounding. Alone: SQNR of the network's outputs if only "
        "this tensor were rounded, to the first order. All up to here: SQNR of what the layer makes in the file.</p>"
        f"<details><summary>{len(rows)} rows</summary>{html_table(['layer', 'operator', *heads], rows)}</details>"
    )


def _own_and_alone(x: "TensorFacts | None") -> Sequence[str]:
    return ["", ""] if x is None else [db_text(x.sqnr_db), "" if x.alone_db is None else db_text(x.alone_db)]


def _done(found: "Diagnosis") -> str:
    steps = "".join(f"<li>{escape(step)}</li>" for step in found.steps)
    listed = f"<details><summary>{len(found.steps)} notes</summary><ul>{steps}</ul></details>" if steps else ""
    recipe = f"<details><summary>the recipe</summary><pre>{escape(found.recipe.strip())}</pre></details>"
    return f"<h2>What was done</h2>{listed}{recipe}"
