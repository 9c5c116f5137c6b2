"""Learned ranges: the steps of all activations move together to where the outputs are closest to the float network's.

Source of the gradient: Esser et al. 2020 (LSQ, arXiv 1902.08153), eq. 3. No labels are needed.
"""

import sys

from lowbit.network.blocks import find_blocks
from lowbit.network.calibrate import both_walks
from lowbit.network.in_step import in_step
from lowbit.network.network import Network
from lowbit.repair.learn import Lesson, Parts, floats_of, learn
from lowbit.repair.prove import Calibration

STEPS = 200  # a batch each


def learn_ranges(network: Network, calibration: Calibration) -> list[str]:
    """Learn the steps of the activations that have one each, by the error of the outputs. What was done, in words."""
    calibration.stage("learning ranges")
    (whole,) = find_blocks(network.module, most=sys.maxsize)
    scales = Parts.of(network, whole).scales
    if not scales:
        return []
    exact, _ = both_walks(network, calibration.together)
    inputs = [n for n in network.module.graph.nodes if n.op == "placeholder"]
    with network.mode("quantize"):
        for _ in in_step(*exact, nodes=inputs):
            pass
        reads = [{node: walk.env[node] for node in whole.reads} for walk in exact]
        for _ in in_step(*exact, nodes=whole.nodes):
            pass
        wanted = [floats_of(walk, whole.makes) for walk in exact]
        better = learn(network, Lesson(whole, reads, reads, wanted), Parts({}, scales, []), STEPS, keep_exact=0.0)
    return [f"learned {len(scales)} ranges"] if better else []
