"""Cross-layer equalization of weights: channel by channel, the weights before and behind get the same range.

Source: Nagel et al. 2019 (arXiv 1906.04721), eq. 8-11. See `graph.channels` for what a scale passes through.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lowbit.graph.changed import Changed
from lowbit.graph.channels import channels_of, largest

ROUNDS = 20


def equalize_weights(program: ir.Model) -> Changed:
    """Divide channel i by s_i = √(r1_i / r2_i); needs no data.

    r1 is the largest weight that makes a channel, r2 the largest that reads it. Repeated until nothing moves by more
    than 0.1 %, at most ROUNDS times. Channels with a ceiling stay: the step `equalize` knows which of them reach it.
    """
    channels = channels_of(program)
    for _, ids in channels.ceilings:
        channels.free[ids] = False
    kept = [f"'{node.name}' kept: it has a ceiling, which does not scale" for node, _ in channels.ceilings]
    done: dict[str, None] = {}
    for _ in range(ROUNDS):
        r1 = largest(((np.abs(layer.by_output()).max(1), ids) for layer, ids in channels.makers), len(channels.free))
        r2 = largest(((np.abs(layer.by_input()).max(1), ids) for layer, ids in channels.readers), len(channels.free))
        alive = channels.free & (r1 > 0) & (r2 > 0)
        factors = np.sqrt(np.divide(r1, r2, out=np.ones_like(r1), where=alive))
        done |= dict.fromkeys(channels.divide(factors))
        if np.abs(np.log(factors)).max(initial=0) < 1e-3:
            break
    return Changed(tuple(f"output channels of '{name}' equalized" for name in done), tuple(kept))
