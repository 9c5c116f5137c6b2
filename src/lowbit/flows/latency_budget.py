"""Layers in float under a budget of time: those that change the outputs least while the rest stays in integers.

    minimise    Σ_l e(l) (1 − x(l)) + Σ_v e(v) z(v)              e: squared error that a quantizer adds to the outputs
    subject to  Σ_l t_int(l) (1 − x(l)) + t_float(l) x(l) ≤ T     t: seconds of the layer, from the engine's profile
                z(v) ≥ 1 − x(l) for each layer l around value v   x(l) = 1: layer l computes in float

What conversions between float and integers take is not in the profile of either file: real files correct the limit.
Source of the idea: HAWQ-V3 (Yao et al. 2021, arXiv 2011.10680), eq. 7 with latency.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from lowbit.deploy.compact import compact
from lowbit.deploy.export import export
from lowbit.engines.compile import ENGINES, Run
from lowbit.engines.profile import layer_seconds
from lowbit.errors import TooSmallError, UnsupportedError
from lowbit.flows.latency import side_by_side
from lowbit.flows.prices import check_loss
from lowbit.flows.ptq import Observed, Stage, settled
from lowbit.model import Model
from lowbit.recipe import Recipe
from lowbit.repair.prove import float_outputs, judging_error
from lowbit.repair.sensitivity import quantizer_costs
from lowbit.repair.wider import Wider, choices_of, layers_beside, literal
from lowbit.solve.program import Amounts
from lowbit.targets import find_target

TRIES = 6  # real files, the first with all layers in integers
SECONDS = 1.0  # that each is timed for, beside the float network


@dataclass(frozen=True)
class _Try:
    recipe: Recipe
    error: float
    share: float


def within_latency(seen: Observed, base: Recipe, model: Model, share: float, loss: str, stage: Stage) -> Recipe:
    """The base with the layers in float that a latency of `share` of the float network's leaves time for.

    TooSmallError names the nearest share that can be met; UnsupportedError where the engine has no profile.
    """
    if find_target(base.target).engine != "onnxruntime":
        raise UnsupportedError(
            f"a budget of latency is planned by onnxruntime's profile, and target '{base.target}' is for another "
            "engine. Use --max-drop, which measures whole files, or another target."
        )
    check_loss(loss, seen.calibration)
    base = replace(base, passes=tuple(name for name in base.passes if name != "leave_in_float"))
    network, calibration = settled(seen.again(base), base).network, seen.calibration
    sample = calibration.single[0]
    bench = _Bench(seen, loss, ENGINES["onnxruntime"].compile(model.program, threads=1))
    stage("timing layers")
    costs = quantizer_costs(network, calibration.single, loss, calibration.single_labels)
    layers = set(chain(*layers_beside(network, costs).values()))
    before, after = (layer_seconds(program, layers, sample) for program in (network.program, export(network)))

    def taken(layer: str, chosen: Wider) -> Amounts:
        return {"seconds": (before if chosen[1] else after)[layer]}

    program, several = choices_of(network, costs, ((False, False), (True, True)), taken)
    whole, tries = sum(before.values()), [bench.judged(base)]
    trust = tries[0].share / (sum(after.values()) / whole)
    for number in range(1, TRIES):
        limit = {"seconds": share * whole / trust - after[""]}
        chosen = program.least("error", limit) or program.least("seconds") or {}
        floats = [layer for layer, index in chosen.items() if several[layer][index][1]]
        recipe = base.keep_float(*map(literal, floats))
        if any(recipe == known.recipe for known in tries):
            break
        stage(f"trying layers in float, {number} of {TRIES - 1}")
        # A file with all layers in float is the float network.
        tries.append(bench.judged(recipe) if len(floats) < len(several) else _Try(recipe, 0.0, 1.0))
        trust = tries[-1].share / ((program.total(chosen)["seconds"] + after[""]) / whole)
    kept = [tried for tried in tries if tried.share <= share]
    if not kept:
        fastest = min(tried.share for tried in tries)
        raise TooSmallError(
            f"no file takes {share:g} of the float network's time. The fastest of {len(tries)} took {fastest:.3g}: ask "
            f"for {fastest + 0.01:.2f} or more."
        )
    return min(kept, key=lambda tried: tried.error).recipe


@dataclass(frozen=True)
class _Bench:
    """Files beside the float network."""

    seen: Observed
    loss: str
    exact: Run

    def judged(self, recipe: Recipe) -> _Try:
        """Of a recipe's file: the error of its outputs on samples not fitted to, and its share of float's time."""
        calibration = self.seen.calibration
        sample = calibration.single[0]
        network = settled(self.seen.again(recipe), recipe).network
        program = compact(export(network), network.program)
        runs = {"float": self.exact, "file": ENGINES["onnxruntime"].compile(program, threads=1)}
        times = side_by_side({name: partial(run, sample) for name, run in runs.items()}, seconds=SECONDS)
        error = judging_error(network, calibration, float_outputs(self.seen.network, calibration.judging), self.loss)
        return _Try(recipe, error, times["file"].median_ms / times["float"].median_ms)
