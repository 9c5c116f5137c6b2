"""Block reconstruction: rounding and ranges learned together, so that each block's outputs come closest to float.

Source: Li et al. 2021 (BRECQ, arXiv 2102.05426): a block of a few layers at a time; Wei et al. 2022 (QDrop, arXiv
2203.05740): in half of the places, drawn anew at each step, an activation passes unquantized, so that the block does
not lean on the very errors of these samples; Esser et al. 2020 (LSQ, arXiv 1902.08153): the steps of activations learn.
"""

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from lowbit.network.blocks import Block, find_blocks
from lowbit.network.calibrate import both_walks, solve_in_step
from lowbit.network.in_step import Walk, in_step
from lowbit.network.network import Network
from lowbit.repair.learn import Lesson, Parts, floats_of, learn
from lowbit.repair.prove import Calibration

STEPS = 300  # of each block, a batch each
KEEP_EXACT = 0.5  # share of the places in which an activation passes unquantized


def reconstruct(network: Network, calibration: Calibration) -> list[str]:
    """Learn the weights, the steps of the activations and the biases, block after block. What was done, in words."""
    blocks, better = find_blocks(network.module), 0
    settled: set[nn.Module] = set()
    with network.mode("quantize"):
        exact, quantized = both_walks(network, calibration.together)
        for _ in in_step(*exact, *quantized, nodes=[n for n in network.module.graph.nodes if n.op == "placeholder"]):
            pass
        for number, block in enumerate(blocks):
            calibration.stage(f"reconstructing block {number + 1} of {len(blocks)}")
            lesson, parts = _lesson(network, block, exact, quantized), Parts.of(network, block, settled)
            better += learn(network, lesson, parts, STEPS, KEEP_EXACT)
            settled |= {*parts.weights, *parts.scales}
            for _ in in_step(*quantized, nodes=block.nodes):
                pass
    return [f"reconstructed {better} of {len(blocks)} blocks"] if better else []


def _lesson(network: Network, block: Block, exact: Sequence[Walk], quantized: Sequence[Walk]) -> Lesson:
    """Take the exact walks through the block.

    Solvers that look at what a weight is multiplied with look again: the blocks before are others now.
    """
    given = [{node: walk.env[node] for node in block.reads} for walk in exact]
    rough: list[dict[fx.Node, Any]] = [{node: walk.env[node] for node in block.reads} for walk in quantized]
    solve_in_step(network, exact, quantized, block.nodes)
    for walk, before in zip(quantized, rough, strict=True):
        for node in block.nodes:
            walk.env.pop(node, None)
        walk.env |= before
    return Lesson(block, given, rough, [floats_of(walk, block.makes) for walk in exact])
