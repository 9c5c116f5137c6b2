"""The smallest file that keeps the metric: post-training quantization, repairs, then as few layers in float as can be.

The order is that of Wu et al. 2020 (arXiv 2004.09602), section 6: calibrate, try other calibrations, leave sensitive
layers in float. What they do last, training, is named where nothing else helped. Every try is a file that ran on the
test data; the tries with the same passes share one pass over the calibration data.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import inf, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lowbit
from lowbit.data import Data
from lowbit.engines.compile import ENGINES, serialize
from lowbit.errors import InputError
from lowbit.flows.bench import Bench, read_again
from lowbit.flows.judge import Judge, digest, sample_digests
from lowbit.flows.metrics import Metric
from lowbit.flows.ptq import MEMORY, Stage, given
from lowbit.flows.study import study
from lowbit.flows.tries import PREFER, Save, Tries, Try
from lowbit.model import Model, load
from lowbit.numerics import Int
from lowbit.ranges import Auto
from lowbit.recipe import IMPROVE, Recipe, Rule
from lowbit.repair.sensitivity import quantizer_costs
from lowbit.repair.wider import BYTES_WEIGH, wider
from lowbit.report.words import plain
from lowbit.targets import find_target

if TYPE_CHECKING:
    from rich.console import RenderableType

HALVINGS = 9  # tries that look for the fewest layers in float
CLOSE = 0.3  # logarithms of two shares of the error, one that fails and one that reaches: 20 %
CLASSES = ("top1", "top5", "agreement with float", "bits-per-token", "perplexity")  # metrics of class scores
REPAIRS = {"GPTQ": ("gptq", ("smooth", "correct_bias"))}  # solver and steps
# At 8 bits these take six times as long and gain nothing. AdaRound: MobileNet v1 0.25 23.8 dB (GPTQ 23.4), ResNet-20
# 32.1 (32.5), kws-dscnn 34.3 (35.3). Reconstruction is undone on MobileNet and kws-dscnn.
REPAIRS_OF_FEW_BITS = {
    "AdaRound": ("adaround", ("smooth", "correct_bias")),
    "reconstructed": ("gptq", ("smooth", "reconstruct", "correct_bias")),
}
QUICK = 60.0  # seconds: what takes longer is not tried again with other formats, unless nothing else is there


@dataclass(frozen=True)
class Search:
    """What a search has found.

    recipe, model   of the best try: of those that drop by at most `max_drop` points the smallest or fastest file, else
                    the one that drops least
    tries           in the order in which they were made; the last is the float network
    reached         whether a quantized file drops by at most max_drop
    interrupted     whether Ctrl-C ended it before all was tried
    """

    recipe: Recipe
    model: Model
    tries: tuple[Try, ...]
    best: Try
    metric: Metric
    max_drop: float
    reached: bool
    interrupted: bool

    @property
    def verdict(self) -> str:
        """One or two plain sentences."""
        measured, before = self.best.measured, self.tries[-1].measured
        assert measured is not None
        assert before is not None
        values = f"{self.metric.name} {self.metric.text(before.metric)} → {self.metric.text(measured.metric)}"
        bar = f"a drop of {measured.drop:.2f} points where {self.max_drop:g} are allowed"
        text = f"{'reached' if self.reached else 'not reached'}: {values}, {bar}, by '{self.best.what}'."
        if self.interrupted:
            text += " Interrupted: the best so far is kept, and the same search goes on where it was."
        elif not self.reached and self.metric.name in CLASSES:
            text += (
                " What is left is quantization-aware training (`lowbit train`) on data with labels, or from the float "
                "network's answers; or allow a larger drop."
            )
        elif not self.reached:
            text += " What is left is a larger drop, or more calibration data like the test data."
        return text

    def why(self, row: Try) -> str:
        """Why a try was kept or not."""
        if row.failed:
            return f"failed: {row.failed}"
        if row is self.best:
            return "kept"
        if not row.recipe:
            return "as it was"
        if not row.reaches(self.max_drop):
            return "drops more" if self.reached else "no better"
        return "reaches it too"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [asdict(row) | {"why": self.why(row)} for row in self.tries]
        found = {"reached": self.reached, "interrupted": self.interrupted, "verdict": self.verdict, "tries": rows}
        result: dict[str, Any] = plain(found | {"metric": self.metric.name, "max_drop": self.max_drop})
        return result

    def __str__(self) -> str:
        from lowbit.report.comparison import as_text

        return as_text(self)

    def __rich__(self) -> "RenderableType":
        from lowbit.report.tries import tries_view

        return tries_view(self)


def search(
    model: Any,
    calibration: Any,
    test: Any,
    *,
    metric: "str | Metric | Callable[..., float] | None" = None,
    max_drop: float = 0.5,
    recipe: "str | Path | Recipe" = "int8",
    target: str | None = None,
    prefer: str = "bytes",
    trials: int | None = None,
    storage: str | None = None,
    output: str | Path | None = None,
    memory: int = MEMORY,
    stage: Stage = lambda _: None,
    save: Save = Model.save,
) -> Search:
    """The smallest or fastest file whose metric on the test data drops by at most `max_drop` points.

    calibration   some hundred typical inputs, as in `quantize`; read once for each set of passes
    test          data that the tries are judged on, with labels where the metric needs them; read once for each try
    metric        a name of METRICS, `module:function` or a function; None: top1 for class labels, and without labels
                  the share of answers that are the float network's
    max_drop      points: hundredths of 1 of a metric that is at most 1, percent of the float network's value of others
    recipe        what is tried first
    prefer        "bytes" or "latency"
    trials        search the recipe's settings with optuna, this many times; None: repairs, then layers in float
    storage       optuna's, as sqlite:///study.db: machines that name the same one share their trials
    output        where the best file lies at any time; the tries lie beside it, and an interrupted search goes on from
                  them. None: nothing is kept
    """
    if isnan(max_drop) or max_drop < 0:
        raise InputError(f"max_drop={max_drop:g}: the points that the metric may drop by are 0 or more.")
    if prefer not in PREFER:
        raise InputError(f"prefer={prefer!r}: what is made small is {' or '.join(PREFER)}.")
    loaded, data, chosen = given(model, calibration, recipe, target)
    chosen.check_deployable()
    name = "recipe" if isinstance(recipe, Recipe) else Path(recipe).stem
    bench = Bench(loaded, read_again("calibration", data), chosen, name, memory, stage)
    engine = find_target(chosen.target).engine
    stage("testing the float network")
    judge = Judge.of(
        loaded, read_again("test", Data.of(test, loaded.inputs)), metric, engine if engine in ENGINES else "onnxruntime"
    )
    key = _key(bench, judge)
    with _place_for(output) as file:
        tries = Tries(judge, key, max_drop, prefer, file, save)
        interrupted = False
        try:
            if trials is None:
                _ladder(bench, tries)
            else:
                study(bench, tries, trials, storage)
        except KeyboardInterrupt:
            if tries.best() is None:
                raise
            interrupted = True
        if tries.best() is None:
            raise InputError(f"no try gave a file. The first: {tries.rows[0].failed}")
        bench.title = "writing the best"
        best = tries.keep(bench.make)
        found = load(file)
    rows = (*tries.rows, Try("float", "", 0.0, measured=judge.of_float()))
    kept = Recipe.from_toml(best.recipe)
    return Search(kept, found, rows, best, judge.metric, max_drop, best.reaches(max_drop), interrupted)


def _ladder(bench: Bench, tries: Tries) -> None:
    """The recipe, the recipe with repairs, then as few layers in float as can be, until the drop is reached."""
    rows = []
    for what, recipe in _rungs(bench, tries.judge.metric):
        bench.title = what
        rows.append(tries.attempt(what, recipe, bench.make))
        if rows[-1].reaches(tries.max_drop):
            return
    base = max(rows, key=lambda row: (row.seconds <= QUICK, row.sqnr_db) if row.measured else (False, -inf))
    may_float = not find_target(bench.recipe.target).whole
    for _ in range(may_float + _has_few_bits(bench.recipe)):  # these get more bits first; then layers stay in float
        if base.measured is None or base.reaches(tries.max_drop):
            return
        base = _fewest_wider(bench, tries, base)


def _rungs(bench: Bench, metric: Metric) -> Iterator[tuple[str, Recipe]]:
    """From plain to thorough. No rung leaves a layer in float: the metric decides that, later."""
    recipe = replace(bench.recipe, passes=tuple(name for name in bench.recipe.passes if name != "leave_in_float"))
    yield bench.name, recipe
    if metric.name in CLASSES:
        other = _changed(recipe, activations={"range": Auto("cross_entropy")})
        if other != recipe:
            yield f"{bench.name}, ranges by cross-entropy", other
    for name, (solve, steps) in (REPAIRS | REPAIRS_OF_FEW_BITS if _has_few_bits(recipe) else REPAIRS).items():
        plain = tuple(p for p in recipe.passes if p not in IMPROVE)
        improve = tuple(p for p in IMPROVE if p in (*recipe.passes, *steps))
        other = replace(_changed(recipe, weights={"solve": solve}), passes=plain + improve)
        if other != recipe:
            yield f"{bench.name}, {name}", other


def _has_few_bits(recipe: Recipe) -> bool:
    """Whether a rule asks for fewer bits than the target's own formats have."""
    own = find_target(recipe.target).weights.grid.bits
    specs = (spec for rule in recipe.rules for spec in (rule.weights, rule.activations))
    return any(spec.format.grid.bits < own for spec in specs if spec is not None and spec.format is not None)


def _changed(recipe: Recipe, **changes: dict[str, Any]) -> Recipe:
    """The recipe with fields of the specs of integers changed: `weights`, `activations`."""

    def renewed(rule: Rule) -> Rule:
        specs = {side: getattr(rule, side) for side in changes}
        integers = {k: s for k, s in specs.items() if s is not None and s.format and isinstance(s.format.grid, Int)}
        return replace(rule, **{side: replace(spec, **changes[side]) for side, spec in integers.items()})

    return replace(recipe, rules=tuple(map(renewed, recipe.rules)))


def _fewest_wider(bench: Bench, tries: Tries, base: Try) -> Try:
    """Halve the share of the predicted error that may stay, until the drop is reached; then bisect back.

    The last try that reaches the drop; where none does, the one with most layers in a wider format.
    """
    recipe = Recipe.from_toml(base.recipe)
    bench.title = "looking for sensitive layers"
    ready = bench.settled(recipe)
    costs = quantizer_costs(ready.network, ready.calibration.single or ready.calibration.judging)
    weigh = BYTES_WEIGH if tries.prefer == "bytes" else 1.0
    fails, reaches = 0.0, None  # logarithms of shares
    found = base
    for _ in range(HALVINGS):
        at = fails - 1 if reaches is None else (fails + reaches) / 2
        if reaches is not None and fails - reaches < CLOSE:
            break
        wide, told = wider(ready.network, costs, 2**at, weigh)
        bench.title = f"{base.what}, {told}"
        row = base if wide == recipe else tries.attempt(bench.title, wide, bench.make)
        if row.reaches(tries.max_drop):
            reaches, found = at, row
        elif row.measured is None:  # nothing is left to quantize
            reaches = at
        else:
            fails, found = at, row if reaches is None else found
    return found


def _key(bench: Bench, judge: Judge) -> dict[str, str]:
    """What the tries depend on; a warning where samples are both fitted to and tested on."""
    fitted = [one for inputs, _ in bench.data.batches() for one in sample_digests(bench.data, inputs)]
    if shared := len(set(fitted) & set(judge.seen)):
        _warn(
            f"{shared} of the {len(judge.seen)} test samples are calibration samples too: the drop on new samples may "
            "be larger. Test on others."
        )
    return {
        "lowbit": lowbit.__version__,
        "network": digest(serialize(bench.model.program)).hex(),
        "calibration data": digest(*fitted).hex(),
        "test data": digest(*judge.seen).hex(),
        "target": bench.recipe.target,
        "metric": f"{judge.metric.name}, of float {judge.before!r}",
    }


def _warn(text: str) -> None:
    import warnings

    warnings.warn(text, stacklevel=4)


@contextmanager
def _place_for(output: str | Path | None) -> Iterator[Path]:
    """Where the best file lies."""
    if output is not None:
        yield Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        yield Path(folder) / "best.onnx"
