"""Layers in float under a budget of time: those that change the outputs least while the rest stays in integers.

    minimise    Σ_l e(l) (1 − x(l)) + Σ_v e(v) z(v)              e: squared error that a quantizer adds to the outputs
    subject to  Σ_l t_int(l) (1 − x(l)) + t_float(l) x(l) ≤ T     t: seconds of the layer, from the engine's profile
                z(v) ≥ 1 − x(l) for each layer l around value v   x(l) = 1: layer l computes in float

What conversions between float and integers take is not in the profile of either file: real files correct the limit.
Source of the idea: HAWQ-V3 (Yao et al. 2021, arXiv 2011.10680), eq. 7 with latency.
"""

from dataclasses import replace
from functools import partial
from itertools import chain

from lowbit.deploy.compact import compact
from lowbit.deploy.export import export
from lowbit.engines.compile import ENGINES, Batch, Run
from lowbit.engines.profile import layer_seconds
from lowbit.errors import TooSmallError, UnsupportedError
from lowbit.flows.latency import side_by_side
from lowbit.flows.prices import check_loss
from lowbit.flows.ptq import Observed, Stage, settled
from lowbit.flows.real_networks import RealNetwork, RealNetworks
from lowbit.model import Model
from lowbit.network.network import Network
from lowbit.recipe import Recipe
from lowbit.repair.sensitivity import quantizer_costs
from lowbit.repair.wider import Wider, choices_of, layers_beside, literal
from lowbit.solve.program import Amounts
from lowbit.targets import find_target

TRIES = 5  # real files, beside the one with all layers in integers
SECONDS = 1.0  # that each is timed for, beside the float network


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
    stage("timing layers")
    costs = quantizer_costs(network, calibration.single, loss, calibration.single_labels)
    layers = set(chain(*layers_beside(network, costs).values()))
    before, after = (layer_seconds(program, layers, sample) for program in (network.program, export(network)))

    def taken(layer: str, chosen: Wider) -> Amounts:
        return {"seconds": (before if chosen[1] else after)[layer]}

    program, several = choices_of(network, costs, ((False, False), (True, True)), taken)
    whole = sum(before.values())
    in_float = base.keep_float(*map(literal, several))  # its file is the float network
    measure = partial(_share_of_time, ENGINES["onnxruntime"].compile(model.program, threads=1), sample)
    real = RealNetworks(seen, loss, measure, stage, {in_float: RealNetwork(in_float, 0.0, 1.0)})
    real.made.append(real.make(base))
    trust = real.made[0].taken / (sum(after.values()) / whole)

    def plan() -> tuple[Recipe, float]:
        chosen = (
            program.least("error", {"seconds": share * whole / trust - after[""]}) or program.least("seconds") or {}
        )
        floats = [layer for layer, index in chosen.items() if several[layer][index][1]]
        return base.keep_float(*map(literal, floats)), (program.total(chosen)["seconds"] + after[""]) / whole

    def learn(predicted: float, made: RealNetwork) -> None:
        nonlocal trust
        trust = made.taken / predicted

    real.follow(TRIES, "trying layers in float", plan, learn)
    kept = real.within(share)
    if not kept:
        fastest = min(made.taken for made in real.made)
        raise TooSmallError(
            f"no file takes {share:g} of the float network's time. The fastest of {len(real.made)} took {fastest:.3g}: "
            f"ask for {fastest + 0.01:.2f} or more."
        )
    return min(kept, key=lambda made: made.error).recipe


def _share_of_time(exact: Run, sample: Batch, network: Network, _: Recipe) -> float:
    """Of the float network's time for a sample, what the network's file takes."""
    file = ENGINES["onnxruntime"].compile(compact(export(network), network.program), threads=1)
    runs = {"float": partial(exact, sample), "file": partial(file, sample)}
    times = side_by_side(runs, seconds=SECONDS)
    return times["file"].median_ms / times["float"].median_ms
