"""Training from a float network to a file: what is deployed is what was trained, however often it was interrupted."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from toy_networks import network

import lowbit as lb
from lowbit.errors import DataError, DivergedError, InputError
from lowbit.flows.prepare import prepare
from lowbit.flows.trainer import oscillation
from lowbit.metadata import from_text
from lowbit.model import Model
from lowbit.network.live_batchnorm import LiveBatchNorm
from lowbit.network.stored import WeightQuant
from lowbit.recipe import Recipe, Rule, TensorSpec
from lowbit.solve.prune import Pruning
from lowbit.training.checkpoints import Checkpoints

NORM = {"gamma": 1.0, "beta": 0.5, "mean": 0.1, "variance": 2.0}
LSQ2 = Recipe(
    (Rule("*", TensorSpec("int2 channel:0", "lsq"), TensorSpec("uint2", "lsq")),),
    ("recognize_operators", "fold_batchnorm", "fuse_gemm"),
)


def data(count: int = 320, seed: int = 0) -> dict[str, np.ndarray]:
    """Noisy copies of four 6×6 pictures."""
    pictures = np.random.default_rng(9).normal(size=(4, 1, 6, 6))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    return {"x": (pictures[labels] + rng.normal(0, 1.0, (count, 1, 6, 6))).astype(np.float32), "labels": labels}


@pytest.fixture(scope="module")
def model() -> Model:
    return floats()


def floats() -> Model:
    """Two convolutions with batch norms, random, and a layer behind them that is solved by least squares."""
    rng, samples = np.random.default_rng(3), data()
    w1, w2 = ((rng.normal(size=(8, n, 3, 3)) / np.sqrt(9 * n)).astype(np.float32) for n in (1, 8))
    norm = {f"{name}{i}": np.full(8, value, np.float32) for i in (1, 2) for name, value in NORM.items()}
    x = torch.from_numpy(samples["x"])
    for weight in (w1, w2):
        x = torch.relu((torch.conv2d(x, torch.from_numpy(weight)) - 0.1) / (2.0 + 1e-5) ** 0.5 + 0.5)
    features = np.c_[x.flatten(1).numpy(), np.ones(len(x))]
    solved = np.linalg.lstsq(features, 4 * np.eye(4)[samples["labels"]], rcond=None)[0]
    return network(
        """
        toy (float[N,1,6,6] x) => (float[N,4] logits) {
            a = Conv (x, w1)
            b = BatchNormalization (a, gamma1, beta1, mean1, variance1)
            c = Relu (b)
            d = Conv (c, w2)
            e = BatchNormalization (d, gamma2, beta2, mean2, variance2)
            f = Relu (e)
            g = Flatten (f)
            logits = Gemm (g, fc, bias)
        }""",
        w1=w1, w2=w2, fc=solved[:-1], bias=solved[-1], **norm,
    )  # fmt: skip


def trained(model: Model, **options: Any) -> Model:
    samples = options.pop("samples", None) or data()
    options = {"batch": 40, "epochs": 2, "recipe": LSQ2, "rate": 0.02, "bfloat16": False} | options
    return lb.train(
        model, {model.inputs[0].name: samples["x"]} | {k: v for k, v in samples.items() if k != "x"}, **options
    )


def top1(model: Model) -> float:
    test = data(400, seed=1)
    outputs = next(iter(model.run({model.inputs[0].name: test["x"]}).values()))
    return float((outputs.argmax(axis=1) == test["labels"]).mean())


def as_bytes(model: Model) -> bytes:
    return ir.to_proto(model.program).SerializeToString()


def interrupting(phase: str, step: int) -> Callable[..., None]:
    def told(name: str, done: int, total: int, note: str) -> None:
        if (name, done) == (phase, step):
            raise KeyboardInterrupt

    return told


@pytest.mark.parametrize(("of_file", "norms"), [(False, 0), (True, 1)])
def test_a_modules_convolutions_get_no_batch_norm_and_a_files_do(monkeypatch, of_file, norms):
    """A file may have folded one, and trains better with it; of a module it is known that there is none."""
    made: list[Any] = []
    monkeypatch.setattr("lowbit.flows.trainer.prepare", lambda *a, **how: made.append(prepare(*a, **how)) or made[-1])
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        *(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU()),
        *(torch.nn.Flatten(), torch.nn.Linear(16, 4)),
    )
    samples = data(64)
    given = lb.load(module, torch.from_numpy(samples["x"][:1])) if of_file else module
    lb.train(given, samples, "w4a4-lsq", epochs=1, batch=32)
    assert sum(isinstance(part, LiveBatchNorm) for part in made[0].modules()) >= norms
    assert any(isinstance(part, LiveBatchNorm) for part in made[0].modules()) is of_file


def test_two_bits_come_back_by_training(model: Model) -> None:
    test = data(400, seed=1)
    small = trained(model, epochs=6, test={model.inputs[0].name: test["x"], "labels": test["labels"]})
    told = json.loads(small.metadata["lowbit.training"])
    assert [row["step"] for row in told["epochs"]] == [8, 16, 24, 32, 40, 48]
    assert told["float"] == pytest.approx(top1(model), abs=0.005)
    assert told["epochs"][-1]["loss"] < told["epochs"][0]["loss"]
    assert told["epochs"][-1]["value"] == pytest.approx(top1(small), abs=0.005)  # the file is what was trained
    assert top1(small) > 0.92  # measured 0.9525, the float network 0.9975
    formats = [r["format"] for r in from_text(small.metadata["lowbit.ledger"]) if r["role"] == "weight"]
    assert [words.split()[0] for words in formats] == ["int2"] * 3


AVERAGE = {"average": 0.9, "optimizer": "adamw", "rate": 1e-3}
RECIPES = {"augment": "crop-flip", "prune": 0.5, "recipes": ("int8-fast",)}
CUTS = [
    (AVERAGE, 8),
    *(pytest.param(how, step, marks=pytest.mark.slow) for how in (AVERAGE, RECIPES) for step in (3, 13)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "step"), CUTS, ids=lambda value: ",".join(value) if isinstance(value, dict) else value)
def test_an_interrupted_run_ends_with_the_same_file(
    model: Model, how: dict[str, Any], step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints.__init__, "__defaults__", (0.0, *Checkpoints.__init__.__defaults__[1:]))  # type: ignore[index]
    whole = trained(model, checkpoint=tmp_path / "whole.state", **how)
    state = tmp_path / "cut.state"
    for last in (step, min(step + 4, 15)):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "training was interrupted")
                cut = trained(model, checkpoint=state, progress=interrupting("training", last), **how)
            assert json.loads(cut.metadata["lowbit.training"])["interrupted"]
        except KeyboardInterrupt:  # the last recipe had no epoch yet
            assert last < 8 or how.get("recipes")
    again = trained(model, checkpoint=state, **how)
    assert as_bytes(again) == as_bytes(whole)
    assert as_bytes(trained(model, checkpoint=state, **how)) == as_bytes(whole)  # a finished run is there at once


def test_ctrl_c_gives_the_best_epoch_so_far(model: Model) -> None:
    test = data(400, seed=1)
    judged = {model.inputs[0].name: test["x"], "labels": test["labels"]}
    with pytest.warns(UserWarning, match="this is the best epoch so far"):
        small = trained(model, epochs=4, rate=0.05, test=judged, progress=interrupting("training", 30))
    told = json.loads(small.metadata["lowbit.training"])
    assert told["interrupted"]
    assert [row["step"] for row in told["epochs"]] == [8, 16, 24]
    assert top1(small) == pytest.approx(max(row["value"] for row in told["epochs"]), abs=0.005)
    with pytest.raises(KeyboardInterrupt):
        trained(model, progress=interrupting("training", 5))


@pytest.mark.slow
def test_a_run_that_diverged_says_the_rate_and_goes_on_with_another(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "run.state"
    with pytest.raises(
        DivergedError, match=r"stopped at step \d+: the loss is .* The learning rate was .* try a tenth"
    ):
        trained(model, rate=1e4, checkpoint=state)
    monkeypatch.setattr(Checkpoints.__init__, "__defaults__", (0.0, *Checkpoints.__init__.__defaults__[1:]))  # type: ignore[index]
    with pytest.raises(KeyboardInterrupt):
        trained(model, checkpoint=state, progress=interrupting("training", 4))
    with pytest.raises(DivergedError, match=r"run.state' holds the last good checkpoint: the run goes on from it"):
        trained(model, checkpoint=state, rate=1e9)  # the weights of its first step were never written
    steps = []
    small = trained(model, checkpoint=state, progress=lambda phase, done, *_: steps.append((phase, done)))
    assert steps[:2] == [("preparing", 0), ("training", 4)]
    assert as_bytes(small) == as_bytes(trained(model))


def test_damping_pulls_weights_to_the_middle_of_their_bins() -> None:
    """Nagel et al. 2022, eq. 5."""
    quantizer = WeightQuant(TensorSpec("int2 channel:0"))
    weight = torch.tensor([[0.5, -0.9, 0.1], [0.2, 0.3, 0.1]], requires_grad=True)
    rounded = torch.tensor([[0.4, -0.8, 0.0], [0.2, 0.2, 0.2]])
    oscillation([(quantizer, weight, rounded)]).backward()
    inside = torch.tensor([[0.0, 0.0, 0.1], [0.0, 0.0, 0.0]])  # what lies outside of its row's range is left alone
    assert torch.allclose(weight.grad, 2 * inside)  # type: ignore[arg-type]


def test_a_recipe_prunes_by_sensitivity_while_it_trains(model: Model) -> None:
    rule = replace(LSQ2.rules[0], prune=Pruning(0.5, "sensitivity"))
    small = trained(model, epochs=3, recipe=replace(LSQ2, rules=(rule, *LSQ2.rules[1:])))
    rows = [row for row in from_text(small.metadata["lowbit.ledger"]) if row["role"] == "weight"]
    size = {row["tensor"]: small.program.graph.initializers[row["tensor"]].const_value.size for row in rows}
    assert sum(row["sparsity"] * size[row["tensor"]] for row in rows) > 0.5 * sum(size.values())
    assert Recipe.from_toml(small.metadata["lowbit.recipe"]).rules[0].prune == Pruning(0.5, "sensitivity")


def test_sparse_and_low_bit_at_once(model: Model) -> None:
    four = Recipe((Rule("*", TensorSpec("int4 channel:0", "lsq"), TensorSpec("uint4", "lsq")),), LSQ2.passes)
    small = trained(model, epochs=3, prune=0.6, recipe=four)
    rows = [row for row in from_text(small.metadata["lowbit.ledger"]) if row["role"] == "weight"]
    values = [small.program.graph.initializers[row["tensor"]].const_value.numpy().astype(int) for row in rows]
    zeros, all_of_them = (sum(int(count(v)) for v in values) for count in (lambda v: (v == 0).sum(), np.size))
    assert zeros / all_of_them > 0.6
    assert top1(small) > 0.85  # measured 0.8925


@pytest.mark.slow
def test_features_inside_the_network_agree_when_they_are_asked_to(model: Model) -> None:
    small = trained(model, features=["c", "f"], distill=1.0)
    assert [output.name for output in small.outputs] == ["logits"]
    assert top1(small) > 0.5
    with pytest.raises(InputError, match="feature 'relu_9' is no value inside the network"):
        trained(model, features=["relu_9"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"labels": np.zeros((320, 2), np.int64)}, r"labels of shape \[320, 2\] are not classes of an output"),
        ({"labels": np.eye(4)[np.arange(320) % 4]}, r"They look one-hot: give labels.argmax\(-1\)"),
        ({"x": np.zeros((1, 1, 6, 6), np.float32), "labels": np.zeros(1, np.int64)}, "has 1 sample, and a batch norm"),
        ({"labels": np.full(320, 4)}, "label 4 has no class: 'logits' has 4 classes"),
        ({"x": np.zeros((30, 1, 6, 6), np.float32), "labels": np.zeros(30, np.int64)}, "has 30 samples and a batch 40"),
        ({"x": np.full((320, 1, 6, 6), np.nan, np.float32)}, "holds nan in sample 0"),
    ],
    ids=["shape", "one-hot", "one", "class", "few", "nan"],
)
def test_data_that_cannot_be_trained_on_is_refused(model: Model, change: dict[str, np.ndarray], told: str) -> None:
    with pytest.raises(DataError, match=told):
        trained(model, samples=data() | change)


def test_a_checkpoint_of_other_data_or_of_another_recipe_is_refused(model: Model, tmp_path: Path) -> None:
    state = tmp_path / "run.state"
    trained(model, epochs=0.5, checkpoint=state)
    with pytest.raises(InputError, match="belongs to another run, with another data"):
        trained(model, epochs=0.5, checkpoint=state, samples=data(seed=5))
    with pytest.raises(InputError, match=r"another recipe and schedule \(epochs=0.5\)"):
        trained(model, epochs=1, checkpoint=state, recipe="int8-fast")


def test_a_test_that_cannot_be_judged_is_refused_before_training(model: Model) -> None:
    steps: list[str] = []
    with pytest.raises(DataError, match="top1 needs integer labels"):
        trained(model, test={"x": data(9)["x"], "labels": np.zeros(9)}, progress=lambda phase, *_: steps.append(phase))
    assert "training" not in steps


def test_a_network_that_is_quantized_already_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match="is quantized already"):
        trained(trained(model, epochs=0.2))


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"channels_last": True}, {"bfloat16": True}, {"clip": 1.0, "warm_up": 0.5}], ids=str)
def test_a_file_is_what_was_trained_however_it_was(model: Model, how: dict[str, Any]) -> None:
    test = data(400, seed=1)
    small = trained(model, test={model.inputs[0].name: test["x"], "labels": test["labels"]}, **how)
    told = json.loads(small.metadata["lowbit.training"])["epochs"]
    assert told[-1]["value"] == pytest.approx(top1(small), abs=0.005)
    assert top1(small) > 0.85
