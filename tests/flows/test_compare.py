"""Comparing two networks: figures are their formulas, the verdict follows the evidence, files are measured as such."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from toy_networks import network

from lowbit.errors import DataError, InputError, ModelError
from lowbit.flows.compare import compare
from lowbit.flows.evaluate import evaluate, predict
from lowbit.flows.fidelity import Closeness
from lowbit.flows.latency import side_by_side
from lowbit.flows.metrics import METRICS, Tally, metric_of
from lowbit.model import Model, load
from lowbit.storage.container import pack


def linear(weight: np.ndarray, output: str = "logits") -> onnx.ModelProto:
    """y = relu(x W), one hidden value `hidden`."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["hidden"], "product"),
            helper.make_node("Relu", ["hidden"], [output], "clip"),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", weight.shape[0]])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(0).normal(0.3, size=(6, 4)).astype(np.float32)


@pytest.fixture
def samples(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = np.abs(np.random.default_rng(1).normal(size=(50, 6))).astype(np.float32)
    return x, np.maximum(x @ weight, 0).argmax(1)


def changed(weight: np.ndarray, size: float) -> Model:
    noise = np.random.default_rng(2).normal(size=weight.shape) * size
    return load(linear(weight + noise))


def test_a_network_equals_itself(weight, samples):
    found = compare(load(linear(weight)), load(linear(weight)), samples)
    assert found.metric == "top1"
    assert found.reference.metric == found.candidate.metric == 1.0
    assert found.agreement == 1.0
    assert found.outputs[0].sqnr_db == np.inf
    assert found.outputs[0].largest_difference == 0
    assert found.kept == "keeps"
    assert [layer.value for layer in found.layers] == ["hidden", "logits"]


def test_the_figures_are_their_formulas(weight, samples):
    reference, candidate = load(linear(weight)), changed(weight, 0.05)
    x, labels = samples
    a, b = reference.run({"x": x})["logits"], candidate.run({"x": x})["logits"]
    found = compare(reference, candidate, (x, labels), batch=7, latency=False)
    output = found.outputs[0]
    assert output.sqnr_db == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), rel=1e-6)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    assert output.cosine == pytest.approx(np.mean(((a * b).sum(1) / norms)[norms > 0]), abs=1e-6)
    assert output.largest_difference == pytest.approx(np.abs(a - b).max(), rel=1e-6)
    assert output.agreement == (a.argmax(1) == b.argmax(1)).mean()
    assert found.candidate.metric == (b.argmax(1) == labels).mean()
    assert found.samples == 50


def test_noise_inside_meets_the_dequantized_counterpart(weight, samples):
    reference = linear(weight)
    candidate = linear(weight)
    nodes = candidate.graph.node
    nodes[1].input[0] = "hidden_dequantized"
    nodes.insert(1, helper.make_node("Mul", ["hidden", "factor"], ["hidden_dequantized"], "noise"))
    candidate.graph.initializer.append(numpy_helper.from_array(np.float32(1.01), "factor"))
    found = compare(load(reference), load(candidate), samples, latency=False)
    assert found.layers[0].value == "hidden"
    assert found.layers[0].sqnr_db == pytest.approx(40, abs=0.1)  # 1 % of amplitude
    again = compare(load(candidate), load(candidate), samples, latency=False)  # two values with one counterpart
    assert [layer.value for layer in again.layers] == ["hidden", "hidden_dequantized", "logits"]
    assert again.layers[1].sqnr_db == np.inf


@pytest.mark.parametrize(
    ("candidate", "db"),
    [([-np.inf, 1.0], np.inf), ([-np.inf, 0.9], 20.0), ([-3.4e38, 1.0], -np.inf), ([0.0, np.inf], -np.inf)],
    ids=["the same", "the same infinity", "another mask", "infinite"],
)
def test_infinities_of_masks_are_no_noise_where_both_have_them(candidate, db):
    closeness = Closeness()
    closeness.add_noise(np.float32([-np.inf, 1.0]), np.float32(candidate))
    assert closeness.sqnr_db == pytest.approx(db, abs=1e-4)


def test_without_labels_the_answers_are_the_evidence(weight, samples):
    found = compare(load(linear(weight)), changed(weight, 2.0), samples[0], latency=False)
    assert found.metric is None
    assert found.kept == "does not keep"
    assert "same answer on" in found.verdict


def test_an_error_that_grows_is_worse_and_one_that_falls_is_better(weight, samples):
    x = samples[0]
    reference, candidate = load(linear(weight)), changed(weight, 0.1)
    target = np.maximum(x @ weight, 0)
    worse = compare(reference, candidate, (x, target), "mse", latency=False)
    assert worse.drop > 0
    assert worse.kept == "does not keep"
    better = compare(candidate, reference, (x, target), "mse", latency=False)
    assert better.drop == pytest.approx(-100)  # percent of the first network's error
    assert better.kept == "keeps"


def test_bytes_of_a_path_are_those_of_the_file(tmp_path, weight, samples):
    for name, given in (("a.onnx", weight), ("b.onnx", weight[:, :4])):
        Path(tmp_path / name).write_bytes(linear(given).SerializeToString())
    found = compare(tmp_path / "a.onnx", tmp_path / "b.onnx", samples, layers=False)
    assert found.reference.bytes_on_disk == (tmp_path / "a.onnx").stat().st_size
    assert found.reference.latency is not None
    assert found.reference.latency.runs == found.candidate.latency.runs >= 10


def test_external_data_counts_as_bytes_on_disk(tmp_path, samples):
    weight = np.ones((6, 4), np.float32)
    onnx.save(linear(weight), tmp_path / "a.onnx", save_as_external_data=True, location="a.bin", size_threshold=0)
    found = compare(tmp_path / "a.onnx", load(linear(weight)), samples, latency=False, layers=False)
    assert found.reference.bytes_on_disk == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_container_is_compared_as_what_it_holds_and_counts_its_own_bytes(tmp_path, weight, samples):
    Path(tmp_path / "a.onnx").write_bytes(linear(weight).SerializeToString())
    size = pack(tmp_path / "a.onnx", tmp_path / "a.lowbit")
    found = compare(tmp_path / "a.onnx", tmp_path / "a.lowbit", samples)
    assert found.candidate.bytes_on_disk == size
    assert found.kept == "keeps"
    assert found.candidate.latency is not None


def test_the_page_and_the_json_say_the_same(weight, samples):
    found = compare(load(linear(weight)), changed(weight, 0.01), samples)
    page = str(found)
    assert found.verdict.split(":")[0] in page
    for word in ("top1", "bytes on disk", "latency, onnxruntime, batch 1, 1 thread", "SQNR", "hidden"):
        assert word in page
    loaded = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert loaded["verdict"] == found.verdict
    assert loaded["layers"][0]["value"] == "hidden"


def test_networks_of_other_outputs_are_not_compared(weight, samples):
    with pytest.raises(ModelError, match=r"differ in their outputs: logits; scores"):
        compare(load(linear(weight)), load(linear(weight, "scores")), samples)
    with pytest.raises(ModelError, match=r"differ in their input 'x' float32\[batch, 6\]: the second takes .*batch, 5"):
        compare(load(linear(weight)), load(linear(weight[:5])), samples)


def test_wrong_arguments_say_what_there_is(weight, samples):
    model = load(linear(weight))
    with pytest.raises(InputError, match=r"metric 'top-1' does not exist. Did you mean 'top1'"):
        compare(model, model, samples, "top-1")
    with pytest.raises(InputError, match=r"engine 'tensorflow' does not exist. There are onnxruntime"):
        compare(model, model, samples, engine="tensorflow")
    with pytest.raises(DataError, match=r"'top1' needs labels, and the data has none"):
        compare(model, model, samples[0], "top1")
    with pytest.raises(DataError, match=r"labels from 0 to 9, but the output has 4 classes"):
        compare(model, model, (samples[0], np.arange(50) % 10))


def test_latencies_alternate():
    order: list[str] = []
    found = side_by_side({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0, least_runs=4)
    assert order == [*"aaabbb", *"abba", *"abba"]
    assert found["a"].runs == 4


# ---------------------------------------------------------------- metrics


def value(name: str, output: list, labels: list) -> float:
    tally = Tally(metric_of(name))
    half = len(labels) // 2
    for part in (slice(None, half), slice(half, None)):
        tally.add({"y": np.asarray(output, np.float32)[part]}, np.asarray(labels)[part])
    return tally.value()


def test_metrics_by_hand():
    scores = [[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]
    assert value("top1", scores, [1, 0, 0, 1]) == 0.5
    assert value("top5", np.eye(8)[[0, 1, 2, 3]] + np.arange(8) / 100, [0, 7, 3, 1]) == 0.5
    assert value("auc", [0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert value("auc", scores, [1, 0, 1, 0]) == 1.0
    assert value("mse", [[1, 2], [3, 4]], [[1, 2], [3, 6]]) == 1.0
    assert value("mae", [1, 2, 3, 4], [1, 2, 3, 6]) == 0.5
    assert value("spearman", [1, 2, 3, 10], [1, 4, 9, 16]) == pytest.approx(1.0)
    assert value("bits-per-token", np.zeros((4, 3, 8)), np.zeros((4, 3), int)) == pytest.approx(3.0)
    assert value("perplexity", np.zeros((4, 3, 8)), np.zeros((4, 3), int)) == pytest.approx(8.0)


def test_auc_and_spearman_agree_with_scipy_and_sklearn():
    stats = pytest.importorskip("scipy.stats")
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    score, labels = random.integers(0, 20, 300).astype(np.float32), random.integers(0, 2, 300)
    assert value("auc", score, labels) == pytest.approx(sklearn.roc_auc_score(labels, score))
    assert value("spearman", score, score + labels * 3) == pytest.approx(stats.spearmanr(score, score + labels * 3)[0])


def test_classes_may_lie_on_the_second_axis_or_the_last():
    pixels = np.zeros((2, 3, 4, 5), np.float32)
    pixels[:, 1] = 1
    labels = np.ones((2, 4, 5), int)
    assert value("top1", pixels, labels) == 1.0
    assert value("top1", pixels.transpose(0, 2, 3, 1), labels) == 1.0


def test_a_function_gets_all_outputs_by_name_and_all_labels(tmp_path, monkeypatch, weight, samples):
    (tmp_path / "mine.py").write_text(
        "def share(outputs, labels):\n    return (outputs['logits'].argmax(1) == labels).mean()\n"
        "def errors(outputs, labels):\n    return 1 - share(outputs, labels)\nerrors.better = 'lower'\n"
    )
    monkeypatch.chdir(tmp_path)
    model = load(linear(weight))
    assert evaluate(model, samples, "mine.py:share", batch=8) == 1.0
    assert evaluate(model, samples, lambda outputs, labels: len(labels)) == 50
    assert metric_of("mine.py:errors").better == "lower"


def test_every_metric_has_its_own_name():
    assert all(name == metric.name for name, metric in METRICS.items())


def test_predict_joins_batches(weight, samples):
    from lowbit.data import Data

    model = load(linear(weight))
    outputs, score = predict(model, Data.of(samples, model.inputs), "top1", batch=16)
    assert outputs["logits"].shape == (50, 4)
    assert score == 1.0


def test_the_operator_that_makes_a_file_slow_is_named():
    """A table of 40,000 × 64 in codes that are decoded as a whole at every call, to look up one row of it."""
    rng = np.random.default_rng(0)
    table, ids = rng.normal(size=(40_000, 64)).astype(np.float32), {"ids": np.zeros((1, 1), np.int64)}
    exact = network("m (int64[N,T] ids) => (float[N,T,64] y) { y = Gather (table, ids) }", table=table)
    slow = network(
        """m (int64[N,T] ids) => (float[N,T,64] y) {
            decoded = DequantizeLinear <axis = 0> (codes, scale)
            y = Gather (decoded, ids)
        }""",
        codes=rng.integers(-127, 127, size=table.shape).astype(np.int8),
        scale=np.full(40_000, 0.02),
    )
    found = compare(exact, slow, [ids], layers=False)
    assert found.slowest is not None
    assert found.slowest.operator == "DequantizeLinear"
    assert found.slowest.share > 0.8
    assert "slower because of DequantizeLinear of 'dequantizelinear_0': " in str(found)
    assert compare(slow, exact, [ids], layers=False).slowest is None
