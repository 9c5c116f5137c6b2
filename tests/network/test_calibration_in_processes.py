"""Calibration that several processes share gives what one gives, bit for bit."""

from pathlib import Path

import pytest
from in_processes import torchrun

SCRIPT = """
import hashlib, torch
from toy_networks import convolutions, images
from lowbit import processes
from lowbit.network.calibrate import observe
from lowbit.network.network import Network
from lowbit.network.place import place
from lowbit.ranges import MovingAverage, MSE
from lowbit.recipe import RECIPES

torch.set_num_threads(1)
model, data = convolutions(), images(56)
program = model.program
name = model.inputs[0].name
batches = [{name: data[i : i + 8]} for i in range(0, 56, 8)]
with processes.joined():
    network = Network(program, place(program, RECIPES["int8"]()))
    assert observe(network, batches) == 7
    said = hashlib.sha256()
    for group, quantizer in sorted(network.activations().items()):
        seen = quantizer.statistics
        assert seen.count and len(seen.history)
        for range in (MovingAverage(), MSE()):
            for bound in range.bounds(seen, quantizer.format):
                said.update(bound.numpy().tobytes())
        said.update(seen.seen.counts.tobytes() + seen.minimum.numpy().tobytes() + seen.maximum.numpy().tobytes())
    print(f"said {said.hexdigest()} of {processes.count()}", flush=True)
"""


@pytest.mark.slow
def test_ranges_of_two_and_four_processes_are_those_of_one_bit_for_bit(tmp_path: Path) -> None:
    told = {count: torchrun(count, SCRIPT, tmp_path) for count in (1, 2, 4)}
    for count, text in told.items():
        lines = [line for line in text.splitlines() if line.startswith("said")]
        assert lines == [f"{told[1].split(' of ')[0].splitlines()[-1]} of {count}"] * count
