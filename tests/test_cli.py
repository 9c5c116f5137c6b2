"""The command line as a stranger meets it: help, results, JSON, and one clear line for whatever goes wrong."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lowbit
from lowbit.cli import main


def small_net() -> onnx.ModelProto:
    """x (batch, 3, 8, 8) → Conv → Relu → mean over pixels → logits of 4 classes."""
    random = np.random.default_rng(0)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["a"], "conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["a"], ["b"], "relu"),
            helper.make_node("GlobalAveragePool", ["b"], ["c"], "pool"),
            helper.make_node("Flatten", ["c"], ["d"], "flatten"),
            helper.make_node("Gemm", ["d", "fc.weight", "fc.bias"], ["logits"], "fc", transB=1),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [
            numpy_helper.from_array(random.normal(size=(16, 3, 3, 3)).astype(np.float32), "conv.weight"),
            numpy_helper.from_array(random.normal(size=16).astype(np.float32), "conv.bias"),
            numpy_helper.from_array(random.normal(size=(4, 16)).astype(np.float32), "fc.weight"),
            numpy_helper.from_array(random.normal(size=4).astype(np.float32), "fc.bias"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, made the current one, with net.onnx and data.npz (32 samples with labels)."""
    monkeypatch.chdir(tmp_path)
    onnx.save(small_net(), "net.onnx")
    x = np.random.default_rng(1).normal(size=(32, 3, 8, 8)).astype(np.float32)
    labels = lowbit_run(small_net(), x).argmax(1)
    np.savez("data.npz", x=x, labels=labels)
    return tmp_path


def lowbit_run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"x": x})[0]


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    return int(exit_.value.code or 0)


def error_of(capsys: pytest.CaptureFixture[str], *words: str, status: int = 1) -> str:
    """The one line on stderr of a command that fails."""
    assert call(*words) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("lowbit: ")
    return lines[0]


# ---------------------------------------------------------------- help


def test_help_names_every_command_and_a_first_try(capsys):
    assert call("--help") == 0
    text = capsys.readouterr().out
    for word in ("quantize", "compare", "show", "run", "lowbit quantize net.onnx --data samples.npz"):
        assert word in text


@pytest.mark.parametrize("command", ["quantize", "compare", "diagnose", "show", "run"])
def test_every_command_shows_an_example(command, capsys):
    assert call(command, "--help") == 0
    assert f"lowbit {command} net" in " ".join(capsys.readouterr().out.split())


def test_help_of_quantize_and_train_names_every_recipe_and_target(capsys):
    from lowbit.presets import RECIPES
    from lowbit.targets import TARGETS

    assert call("quantize", "--help") == call("train", "--help") == 0
    text = capsys.readouterr().out
    assert [name for name in (*RECIPES, *TARGETS) if name not in text] == []


def test_help_of_compare_names_every_metric(capsys):
    from lowbit.flows.metrics import METRICS

    assert call("compare", "--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in METRICS)


def test_a_command_has_at_most_a_dozen_options():
    from typer.main import get_command

    from lowbit.cli.app import app

    counts = {
        name: sum(p.param_type_name == "option" for p in command.params)
        for name, command in get_command(app).commands.items()
    }
    assert counts.pop("quantize") == 13  # --bits, --size and --latency ask one question: which budget
    assert max(counts.values()) <= 12


def test_version_is_the_package_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out.strip() == f"lowbit {lowbit.__version__}"


def test_help_takes_less_than_half_a_second_of_cpu():
    # CPU time, not wall time: a test machine may be busy with other things.
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(3):
        before = spent()
        subprocess.run([sys.executable, "-m", "lowbit", "--help"], check=True, capture_output=True, timeout=60)
        times.append(spent() - before)
    assert min(times) < 0.5


def test_help_imports_neither_torch_nor_onnx():
    code = "import sys, lowbit.cli.app; print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    assert told == "[]\n"


# ---------------------------------------------------------------- the four commands


def test_quantize_compare_show_run_one_after_the_other(place, capsys):
    assert call("quantize", "net.onnx", "--data", "data.npz", "-o", "net.int8.onnx") == 0
    assert "wrote net.int8.onnx" in capsys.readouterr().out
    assert call("compare", "net.onnx", "net.int8.onnx", "--data", "data.npz") == 0
    page = capsys.readouterr().out
    assert "top1" in page
    assert "the job:" in page
    assert call("show", "net.int8.onnx") == 0
    page = capsys.readouterr().out
    assert "conv.weight" in page
    assert "int8" in page
    assert call("run", "net.int8.onnx", "--data", "data.npz", "-o", "y.npz") == 0
    with np.load("y.npz") as found, np.load("data.npz") as given:
        agree = (found["logits"].argmax(1) == given["labels"]).mean()
    assert agree > 0.9


def test_every_command_speaks_json(place, capsys):
    assert call("quantize", "net.onnx", "--data", "data.npz", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["output"] == "net.int8.onnx"
    assert told["bytes"] == Path("net.int8.onnx").stat().st_size
    assert told["weights_quantized"] == 2
    assert call("compare", "net.onnx", "net.int8.onnx", "--data", "data.npz", "--json", "--without", "latency") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["reference"]["metric"] == 1.0
    assert told["kept"] in ("keeps", "nearly keeps", "does not keep")
    assert call("show", "net.int8.onnx", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {"conv.weight", "fc.weight"} <= {row["tensor"] for row in told["tensors"]}
    assert call("run", "net.onnx", "--data", "data.npz", "--metric", "top1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["metric"] == {"name": "top1", "value": 1.0}


def wide_net() -> onnx.ModelProto:
    """x (batch, 3, 8, 8) → logits of 64 classes: a weight that is large enough to be stored in few bits by itself."""
    weight = np.random.default_rng(2).normal(size=(64, 192)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["a"], "flatten"),
            helper.make_node("Gemm", ["a", "fc.weight"], ["logits"], "fc", transB=1),
        ],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 64])],
        [numpy_helper.from_array(weight, "fc.weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_weights_alone_are_quantized_without_data(place, capsys):
    onnx.save(wide_net(), "wide.onnx")
    assert call("quantize", "wide.onnx", "--recipe", "int4 group:32") == 0
    assert "wrote wide.int4-group32.onnx" in capsys.readouterr().out
    x = np.random.default_rng(1).normal(size=(8, 3, 8, 8)).astype(np.float32)
    exact, rough = (lowbit_run(onnx.load(path), x) for path in ("wide.onnx", "wide.int4-group32.onnx"))
    assert 10 * np.log10(np.square(exact).sum() / np.square(exact - rough).sum()) > 17  # 4 bits


@pytest.mark.parametrize("words", [["quantize", "--recipe", "int8"], ["compress", "--ratio", "2"]])
def test_the_extension_of_the_output_says_what_is_written(place, capsys, words):
    onnx.save(wide_net(), "net.onnx")
    for output in ("small.onnx", "small.lowbit"):
        assert call(words[0], "net.onnx", "--data", "data.npz", *words[1:], "-o", output) == 0
    onnx.checker.check_model(onnx.load("small.onnx"))
    assert lowbit.inspect("small.lowbit").unpacked_size > Path("small.lowbit").stat().st_size
    found = [
        lowbit.load(path).run({"x": np.ones((2, 3, 8, 8), np.float32)})["logits"]
        for path in ("small.onnx", "small.lowbit")
    ]
    assert np.array_equal(*found)


@pytest.mark.slow
def test_a_format_of_a_module_of_mine_is_usable(place, capsys):
    onnx.save(wide_net(), "net.onnx")
    Path("mine.py").write_text(
        "import lowbit as lb\nlb.FORMATS['tern'] = lb.Format(lb.Int(2, narrow=True), lb.channel(0))\n"
    )
    words = ["-m", "lowbit", "quantize", "net.onnx", "--recipe", "tern"]
    told = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=200)
    assert told.returncode == 1
    for given in ("mine", "mine.py"):
        told = subprocess.run([sys.executable, *words, "--import", given], capture_output=True, text=True, timeout=200)
        assert told.returncode == 0, told.stderr
        assert "wrote net.tern.onnx" in told.stdout


def in_type(elements: int, dtype: type) -> onnx.ModelProto:
    """The small network with weights, inputs and outputs of another float type."""
    found = small_net()
    for tensor in found.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for port in (*found.graph.input, *found.graph.output):
        port.type.tensor_type.elem_type = elements
    return found


def test_a_note_is_one_line_on_stderr(place, capsys):
    onnx.save(in_type(TensorProto.FLOAT16, np.float16), "half.onnx")
    assert call("quantize", "half.onnx", "--data", "data.npz") == 0
    told = capsys.readouterr()
    assert told.err == (
        "lowbit: note: half.onnx computes in float16: it was converted to float32, from which it is quantized.\n"
    )
    assert call("compare", "half.onnx", "half.int8.onnx", "--data", "data.npz", "--without", "latency") == 0


def test_a_bfloat16_network_runs_although_onnxruntime_does_not_take_it(place, capsys):
    import ml_dtypes

    onnx.save(in_type(TensorProto.BFLOAT16, ml_dtypes.bfloat16), "half.onnx")
    assert call("run", "half.onnx", "--data", "data.npz", "--metric", "top1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["metric"]["value"] > 0.8


def test_show_lists_the_tensors_of_any_onnx_file(place, capsys):
    assert call("show", "net.onnx", "--all") == 0
    page = capsys.readouterr().out
    assert "conv.weight" in page
    assert "1,728" in page
    assert "Not written by lowbit" in page


def test_limit_and_names_choose_samples(place, capsys):
    with np.load("data.npz") as given:
        np.savez("other.npz", images=given["x"], answers=given["labels"], more=np.arange(3))
    words = ["run", "net.onnx", "--data", "other.npz:x=images,labels=answers"]
    assert call(*words, "--limit", "2:7", "-o", "y.npy", "--metric", "top1") == 0
    assert np.load("y.npy").shape == (5, 4)


def test_a_bar_that_is_not_met_is_status_2(place, capsys):
    broken = small_net()
    broken.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.zeros((4, 16), np.float32), "fc.weight"))
    onnx.save(broken, "broken.onnx")
    words = ["compare", "net.onnx", "broken.onnx", "--data", "data.npz", "--without", "latency"]
    assert call(*words) == 0
    assert call(*words, "--max-drop", "1") == 2  # a point: a hundredth of top1
    assert call(*words, "--max-drop", "100") == 0
    assert call("compare", "net.onnx", "net.onnx", "--data", "data.npz", "--without", "latency", "--max-drop", "0") == 0


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "nothing.onnx"], "no such file"),
        (["quantize", "net.onnx", "--data", "nothing.npz"], "there is no file 'nothing.npz'"),
        (["quantize", "net.onnx", "--data", "data.npz", "-o", "net.onnx"], "Choose another output"),
        (["quantize", "net.onnx", "--data", "data.npz", "-o", "data.npz"], "Choose another output"),
        (["quantize", "net.onnx", "--data", "data.npz", "-o", "no/where.onnx"], "there is no folder 'no'"),
        (["quantize", "net.onnx", "--data", "data.npz", "-o", "."], "is a folder"),
        (["quantize", "net.onnx", "--data", "data.npz", "--recipe", "int99"], "int99"),
        (["quantize", "net.onnx", "--data", "data.npz", "--target", "toaster"], "toaster"),
        (["quantize", "data.npz", "--data", "data.npz", "-o", "q.onnx"], "data.npz"),
        (["compare", "net.onnx", "net.onnx", "--data", "data.npz", "--metric", "topp1"], "Did you mean 'top1'"),
        (["compare", "net.onnx", "net.onnx", "--data", "data.npz", "--preprocess", "sacle=2"], "Did you mean 'scale'"),
        (["compare", "net.onnx", "net.onnx", "--data", "data.npz:x=a=b"], "not INPUT=ARRAY"),
        (["run", "net.onnx", "--data", "data.npz"], "give -o y.npz"),
        (["run", "net.onnx", "--data", "data.npz", "-o", "y.txt"], "can be .npz (an array for each output), .npy"),
        (["quantize", "net.onnx", "--data", "data.npz", "-o", "net.tflite"], "can be .onnx (an ONNX file), .lowbit"),
        (["compress", "net.onnx", "--data", "data.npz", "-o", "net.zip"], "can be .onnx (an ONNX file), .lowbit"),
        (["pack", "net.onnx", "-o", "net.onnx2"], "can be .lowbit"),
        (["formats", "--on", "net.onnx", "--plot", "f.png"], "can be .html"),
        (["quantize", "net.onnx"], "give some hundred typical inputs"),
        (["quantize", "net.pt", "--recipe", "nf4"], "a PyTorch checkpoint; give the module"),
        (["quantize", "net.onnx", "--recipe", "nf4", "--import", "nowhere"], "'nowhere' cannot be imported"),
        (["quantize", "net.onnx", "--import"], "--import needs the name of a module"),
        (
            ["run", "net.onnx", "--data", "data.npz", "-o", "y.npz", "--engine", "abacus"],
            "engine 'abacus' does not exist",
        ),
        (["run", "net.onnx", "--data", "data.npz", "-o", "y.npz", "--limit", "99:"], "no samples after the first 99"),
        (["run", "net.onnx", "--data", "data.npz", "-o", "y.npz", "--limit", "x"], "'x' is not N, FROM: or FROM:TO"),
        (["run", "net.onnx", "--data", "data.npz", "-o", "y.npz", "--limit", "5:5"], "takes no sample"),
        (["run", "net.onnx", "--data", "bad.npz", "-o", "y.npz"], "in sample 3"),
        (["quantize", "net.onnx", "--bits", "4"], "give --data"),
        (["quantize", "net.onnx", "--data", "data.npz", "--bits", "0.5"], "Ask for "),
        (["quantize", "net.onnx", "--data", "data.npz", "--bits", "4", "--size", "0.2"], "needs one budget"),
        (["quantize", "net.onnx", "--data", "data.npz", "--bits", "nan"], "bits=nan"),
        (["quantize", "net.onnx", "--data", "data.npz", "--latency", "1.5"], "a share between 0 and 1"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(place, capsys, words, message):
    x = np.zeros((5, 3, 8, 8), np.float32)
    x[3, 0, 0, 0] = np.nan
    np.savez("bad.npz", x=x)
    before = {path: path.read_bytes() for path in place.iterdir()}
    assert message in error_of(capsys, *words)
    assert {path: path.read_bytes() for path in place.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantise"], "Did you mean 'quantize'"),
        (["show", "--jason", "net.onnx"], "No such option: --jason"),
        (["compare", "net.onnx"], "Missing"),
    ],
)
def test_a_wrong_option_is_status_2(place, capsys, words, message):
    assert message in error_of(capsys, *words, status=2)


def test_a_command_alone_shows_its_help(capsys):
    for words in ([], ["quantize"], ["show"]):
        assert call(*words) == 0
        assert "Usage" in capsys.readouterr().out


def test_a_traceback_appears_only_on_request(place, capsys):
    assert call("show", "nothing.onnx") == 1
    assert "Traceback" not in capsys.readouterr().err
    assert call("show", "nothing.onnx", "--traceback") == 1
    assert "Traceback" in capsys.readouterr().err


def test_truncated_and_random_models_are_one_line(place, capsys):
    whole = Path("net.onnx").read_bytes()
    random = np.random.default_rng(0)
    damaged = [whole[: len(whole) // 2], b"", random.bytes(500)]
    for content in damaged:
        Path("broken.onnx").write_bytes(content)
        error_of(capsys, "quantize", "broken.onnx", "--data", "data.npz", "-o", "q.onnx")
        assert not Path("q.onnx").exists()


def test_an_unknown_exception_is_called_a_bug(place, capsys, monkeypatch):
    def explode(*args: object, **options: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("lowbit.model.load", explode)
    assert "internal error: ZeroDivisionError" in error_of(capsys, "show", "net.onnx")


@pytest.fixture
def control_c():
    """SIGINT as at a terminal: a job started with `&` ignores it, and so does every process that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_control_c_says_that_nothing_was_written(place, control_c):
    Path("slow.py").write_text(
        "import sys, time\nimport numpy as np\ndef data():\n    while True:\n        print('.', flush=True)\n"
        "        yield np.zeros((1, 3, 8, 8), np.float32)\n        time.sleep(0.05)\n"
    )
    Path("out.onnx").write_bytes(b"old")
    command = [sys.executable, "-m", "lowbit", "quantize", "net.onnx", "--data", "slow:data", "-o", "out.onnx"]
    found = os.environ | {"PYTHONPATH": str(Path(lowbit.__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=found) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            error = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 130, error
    assert error == "lowbit: interrupted; nothing was written\n"
    assert Path("out.onnx").read_bytes() == b"old"
    assert {path.name for path in place.glob("*.*")} == {"data.npz", "net.onnx", "out.onnx", "slow.py"}
