"""A table that lies in a file beside the network stays there, and is quantized in pieces."""

import os
import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper

pytestmark = pytest.mark.slow  # a process of its own, whose memory is measured

ROWS, COLUMNS = 600_000, 64
SCRIPT = """
import sys, threading, time
import lowbit as lb
import lowbit.deploy.proof, lowbit.flows.ptq
from lowbit.network import stored

stored._LARGE = 0  # decode as if the table were larger than memory
recipe = lb.Recipe((lb.Rule("*", lb.TensorSpec("int4 channel:0", "minmax")),))
lb.quantize(lb.load(sys.argv[1] + "/small.onnx"), None, recipe)  # compiled loops, torch, onnxruntime

def anonymous():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

before, seen = anonymous(), []
def watch():
    while True:
        seen.append(anonymous())
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
quantized = lb.quantize(lb.load(sys.argv[1] + "/large.onnx"), None, recipe)
print(max(seen) - before, quantized.save(sys.argv[1] + "/quantized.onnx"))
"""


def write(folder: str, name: str, rows: int) -> None:
    """A lookup in a table of external data."""
    np.random.default_rng(0).standard_normal((rows, COLUMNS), dtype=np.float32).tofile(f"{folder}/{name}.data")
    table = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[rows, COLUMNS])
    table.data_location = TensorProto.EXTERNAL
    for key, value in (("location", f"{name}.data"), ("offset", "0"), ("length", str(rows * COLUMNS * 4))):
        entry = table.external_data.add()
        entry.key, entry.value = key, value
    ports = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])]
    ends = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", COLUMNS])]
    graph = helper.make_graph([helper.make_node("Gather", ["w", "ids"], ["y"])], "lookup", ports, ends, [table])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with open(f"{folder}/{name}.onnx", "wb") as file:
        file.write(model.SerializeToString())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_table_in_a_file_of_its_own_takes_little_memory(tmp_path):
    write(str(tmp_path), "small", 1000)
    write(str(tmp_path), "large", ROWS)
    freed_at_once = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command, env = [sys.executable, "-c", SCRIPT, str(tmp_path)], os.environ | freed_at_once
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    grown, size = map(int, run.stdout.split())
    table = ROWS * COLUMNS * 4
    assert size < 0.15 * table
    assert grown < 1.6 * table  # measured 1.19, four times the same; 7.6 where nothing is done in pieces
