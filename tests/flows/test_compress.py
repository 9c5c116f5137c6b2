"""Compression from a trained network to a file that reopens, small enough to run in seconds."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import lowbit as lb
from lowbit.errors import DataError, InputError, UnsupportedError
from lowbit.flows.compress import compress
from lowbit.flows.compression import compression
from lowbit.flows.masks import compressible
from lowbit.metadata import from_text
from lowbit.model import Model
from lowbit.network.network import Network
from lowbit.network.sites import Placement, Site
from lowbit.recipe import TensorSpec
from lowbit.solve.kmeans import kmeans
from lowbit.solve.prune import Pruning
from lowbit.storage.container import pack
from lowbit.storage.inspect import inspect
from lowbit.training.checkpoints import Checkpoints
from lowbit.training.schedule import Schedule

CLASSES = 5


def data(count: int = 1200, seed: int = 0) -> dict[str, np.ndarray]:
    """Noisy copies of five 8×8 pictures."""
    pictures = np.random.default_rng(99).normal(size=(CLASSES, 1, 8, 8))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    return {"x": (pictures[labels] + rng.normal(0, 1.5, (count, 1, 8, 8))).astype(np.float32), "labels": labels}


@pytest.fixture(scope="module")
def trained() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(),
        nn.Linear(32, CLASSES),
    )  # fmt: skip
    samples = data()
    x, labels = torch.from_numpy(samples["x"]), torch.from_numpy(samples["labels"])
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(30):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), labels[rows]).backward()
            optimizer.step()
    return lb.load(net.eval(), x[:2])


def named(model: Model, samples: dict[str, np.ndarray], labels: bool = True) -> dict[str, np.ndarray]:
    found = {model.inputs[0].name: samples["x"]}
    return found | ({"labels": samples["labels"]} if labels else {})


def accuracy(model: Model) -> float:
    test = data(1000, seed=1)
    outputs = next(iter(model.run({model.inputs[0].name: test["x"]}).values()))
    return float((outputs.argmax(axis=1) == test["labels"]).mean())


def codes_of(model: Model) -> list[ir.Value]:
    """The initialisers that hold codes."""
    kinds = (ir.DataType.UINT4, ir.DataType.UINT8)
    return [
        v for v in model.program.graph.initializers.values() if v.const_value.dtype in kinds and v.const_value.size > 1
    ]


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "distilled"])
def test_a_compressed_file_reopens_small_and_nearly_as_good(trained: Model, labels: bool, tmp_path: Path) -> None:
    trained.save(tmp_path / "float.onnx")
    samples = named(trained, data(), labels)
    small = compress(trained, samples, prune=0.9, codebook=4, prune_epochs=6, value_epochs=2)
    small.save(tmp_path / "net.onnx")
    size = pack(tmp_path / "net.onnx", tmp_path / "net.lowbit")
    assert size < (tmp_path / "float.onnx").stat().st_size / 12
    again = lb.load(tmp_path / "net.lowbit")
    assert accuracy(again) > accuracy(trained) - 0.03  # measured 0.985 and 0.99
    row = next(t for t in inspect(tmp_path / "net.lowbit").tensors if t.elements == 512 * 32)
    assert row.sparsity > 0.85
    assert row.type == "uint4"
    ledger = from_text(again.metadata["lowbit.ledger"])
    assert {r["format"] for r in ledger if r["role"] == "weight"} == {"codebook4:linear"}


def test_without_training_it_is_prune_and_share_alone(trained: Model) -> None:
    small = compress(trained, named(trained, data(64)), prune=0.0, codebook=8, prune_epochs=0, value_epochs=0)
    assert abs(accuracy(small) - accuracy(trained)) < 0.01
    pruned = compress(trained, named(trained, data(64)), prune=0.5, codebook=0, prune_epochs=0)
    (name,) = [n for n, v in pruned.program.graph.initializers.items() if v.const_value.size == 512 * 32]
    assert np.mean(pruned.program.graph.initializers[name].const_value.numpy() == 0) > 0.4


def test_a_pattern_survives_training(trained: Model) -> None:
    pruning = Pruning(0.5, pattern="2:4")
    small = compress(trained, named(trained, data(300)), prune=pruning, codebook=0, prune_epochs=1)
    value = next(v for v in small.program.graph.initializers.values() if v.const_value.size == 512 * 32)
    weight = value.const_value.numpy()
    rows = weight if weight.shape[1] == 512 else weight.T
    assert (np.count_nonzero(rows.reshape(-1, 4), axis=1) <= 2).all()


def wide_and_narrow(seed: int = 0) -> Model:
    """A layer of weights that matter, one of weights that hardly do."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 24), nn.ReLU(), nn.Linear(24, 40)
    )
    return lb.load(net.eval(), torch.randn(2, 1, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [5, 8, 20])
def test_a_file_is_as_small_as_the_ratio_says_and_no_smaller(ratio: float, tmp_path: Path) -> None:
    model = wide_and_narrow()
    small = compress(model, named(model, data(64), labels=False), ratio=ratio)
    floats = 4 * sum(v.const_value.size for v in model.program.graph.initializers.values())
    size = pack(small, tmp_path / "net.lowbit")
    assert 0.99 * floats / ratio < size <= floats / ratio
    ledger = from_text(small.metadata["lowbit.ledger"])
    assert {row["solver"] for row in ledger if row["role"] == "weight"} == {"gptq"}
    again = lb.load(tmp_path / "net.lowbit")
    x = {model.inputs[0].name: data(200, seed=5)["x"]}
    (exact,), (rough,) = model.run(x).values(), again.run(x).values()
    noise = 10 * np.log10(np.square(exact).sum() / np.square(exact - rough).sum())
    assert noise > {5: 35, 8: 22, 20: 5}[ratio]


def test_a_ratio_prunes_too_where_it_is_asked_to(trained: Model, tmp_path: Path) -> None:
    chosen = "prune_epochs=2 code_epochs=1 value_epochs=1"
    small = compress(trained, named(trained, data(600)), None, chosen, ratio=12, prune=Pruning(0.5, pattern="2:4"))
    assert accuracy(small) > accuracy(trained) - 0.03
    (codes,) = [v.const_value.numpy().astype(int) for v in codes_of(small)]
    zero = np.bincount(codes.reshape(-1)).argmax()
    rows = codes if codes.shape[1] == 512 else codes.T
    assert (np.count_nonzero(rows.reshape(-1, 4) != zero, axis=1) <= 2).all()


def test_a_ratio_that_cannot_be_reached_is_an_error(trained: Model) -> None:
    with pytest.raises(InputError, match="the smallest that was found takes"):
        compress(trained, named(trained, data(64)), ratio=1000)
    with pytest.raises(InputError, match="leave out codebook"):
        compression(ratio=8, codebook=4)
    with pytest.raises(InputError, match="rule 'head': a ratio decides how many values each weight"):
        compression(lb.Recipe((lb.Rule("head", "codebook2"),)), ratio=8)
    with pytest.raises(InputError, match=r"above 1; not 0\.5"):
        compression(ratio=0.5)
    with pytest.raises(InputError, match="a ratio needs a network and samples"):
        lb.compress_tensors({"weight": torch.randn(64, 64)}, lb.Recipe((), ratio=8))


def test_weights_that_are_all_zero_or_constant_are_codes_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 200))
    nn.init.zeros_(net[2].weight)
    nn.init.constant_(net[4].weight, 0.5)
    model = lb.load(net.eval(), torch.randn(2, 64))
    small = compress(model, np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32), ratio=10)
    x = {model.inputs[0].name: np.ones((3, 64), np.float32)}
    (exact,), (rough,) = model.run(x).values(), small.run(x).values()
    np.testing.assert_allclose(rough, exact, rtol=0.02)


@pytest.mark.slow
def test_sentences_of_several_lengths_and_weights_outside_products_are_compressed() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.lstm, self.head = (
                nn.Embedding(200, 32),
                nn.LSTM(32, 64, batch_first=True),
                nn.Linear(64, 40),
            )

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(self.table(ids))[0])

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    net, example = Tagger().eval(), torch.from_numpy(rng.integers(0, 200, (2, 9)))
    length = torch.export.Dim("length", min=2, max=64)
    model = lb.load(net, example, dynamic_shapes=({0: torch.export.Dim("batch"), 1: length},))
    sentences = [rng.integers(0, 200, (4, n)) for n in (5, 9, 12)]
    small = compress(model, sentences, ratio=6)
    assert len(codes_of(small)) >= 4
    x = {model.inputs[0].name: sentences[1]}
    (exact,), (rough,) = model.run(x).values(), small.run(x).values()
    assert 10 * np.log10(np.square(exact).sum() / np.square(exact - rough).sum()) > 20


def test_a_network_without_large_weights_has_nothing_to_fit() -> None:
    model = lb.load(nn.Sequential(nn.Linear(4, 5), nn.ReLU()).eval(), torch.randn(2, 4))
    with pytest.raises(UnsupportedError, match="no weight of 256 elements or more"):
        compress(model, np.zeros((8, 4), np.float32), ratio=6)


def test_several_tables_deploy(trained: Model) -> None:
    (layer,) = compressible(trained.program).values()
    values = f"codebook3:linear tile:{layer.weight.shape[0] // 8}x0"
    rule = lb.Rule("*", lb.TensorSpec(values, solve="kmeans"))
    small = compress(trained, named(trained, data(64)), lb.Recipe((rule,)), value_epochs=0)
    assert (8 * 8,) in {tuple(v.const_value.shape) for v in small.program.graph.initializers.values()}  # 8 tables of 8
    assert accuracy(small) > accuracy(trained) - 0.02  # that the file computes what was meant, compress itself verifies


def test_the_gradient_of_a_shared_value_is_the_sum_over_its_weights(trained: Model) -> None:
    (name,) = compressible(trained.program)
    spec = TensorSpec("codebook3:linear", solve="kmeans")
    network = Network(trained.program, Placement({name: Site(name, "weight", spec, "layer", name)}, {}))
    weight, ((_, quantizer),) = network.parameter(name), network.constants().values()
    quantizer.mask = weight.abs() > weight.abs().median()
    shared = kmeans(weight, spec.format, quantizer.mask)
    x = torch.from_numpy(data(16)["x"])

    def gradient(of: torch.Tensor) -> torch.Tensor:
        with network.mode("quantize"):
            loss = next(iter(network.module(x).values())).square().sum()
        return torch.autograd.grad(loss, [of])[0]

    quantizer.store(shared, "codes")  # codes that train pass the gradient on to the weight
    by_weight = gradient(weight)
    quantizer.store(shared, "values")
    by_table = gradient(quantizer.table)
    for code, value in enumerate(shared.table[0]):
        wanted = float(by_weight[shared.codes == code].double().sum()) if value else 0.0  # zero stays zero
        assert float(by_table[0, code]) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_biases_and_small_layers_are_not_shared(trained: Model) -> None:
    found = compressible(trained.program)
    sizes = sorted(trained.program.graph.initializers[name].const_value.size for name in found)
    assert sizes == [512 * 32]  # the convolution has 72 weights, the last layer 160


def run_apart(arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(Path(lb.__file__).parents[1]), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.Popen([sys.executable, "-c", *arguments], cwd=folder, env=environment)


SCRIPT = """
import sys, torch, lowbit as lb
from lowbit.training.checkpoints import Checkpoints
Checkpoints.__init__.__defaults__ = (0.05, *Checkpoints.__init__.__defaults__[1:])  # twenty a second
from test_compress import data, named
from lowbit.flows.compress import compress
torch.set_num_threads(1)
model = lb.load("float.onnx")
small = compress(model, named(model, data(600)), prune=0.9, prune_epochs=6, value_epochs=6, checkpoint="run.state")
small.save(sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(
    trained: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.save(tmp_path / "float.onnx")
    process = run_apart([SCRIPT, "whole.onnx"], tmp_path)
    assert process.wait(timeout=300) == 0
    assert not (tmp_path / "run.state").exists()
    kills = 0
    for _ in range(6):
        process = run_apart([SCRIPT, "resumed.onnx"], tmp_path)
        before = (tmp_path / "run.state").stat().st_mtime if (tmp_path / "run.state").exists() else 0.0
        while process.poll() is None:
            if (tmp_path / "run.state").exists() and (tmp_path / "run.state").stat().st_mtime > before + 0.3:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        process.wait(timeout=60)
        if (tmp_path / "resumed.onnx").exists():
            break
    else:
        assert run_apart([SCRIPT, "resumed.onnx"], tmp_path).wait(timeout=300) == 0
    assert kills
    assert (tmp_path / "resumed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


PRUNED = {
    "ratio": {"ratio": 8.0, "prune": 0.5},
    "codebook": {
        "recipe": lb.Recipe((lb.Rule("*", lb.TensorSpec("codebook3 tile:128x0", solve="kmeans"), prune=0.9),))
    },
    "int4": {"recipe": lb.Recipe((lb.Rule("*", "int4 channel:0", prune=0.5),)), "value_epochs": 0},  # no table to train
}


@pytest.mark.parametrize(
    ("how", "phase"),
    [
        *((how, phase) for how in ("ratio", "codebook") for phase in ("prune", "codes", "values")),
        *(("int4", phase) for phase in ("prune", "codes")),
    ],
)
def test_a_run_that_is_interrupted_in_any_phase_ends_with_the_same_codes(
    trained: Model, how: str, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints.__init__, "__defaults__", (0.0, *Checkpoints.__init__.__defaults__[1:]))
    samples = named(trained, data(130))
    asked = {"prune_epochs": 2, "code_epochs": 1, "value_epochs": 1} | PRUNED[how]

    def run(state: Path, stop: bool = False) -> Model:
        def interrupt(name: str, done: int, total: int) -> None:
            if stop and name == phase and done == 2:
                raise KeyboardInterrupt

        return compress(trained, samples, **asked, checkpoint=state, progress=interrupt)

    whole = run(tmp_path / "whole.state")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut.state", stop=True)
    resumed = run(tmp_path / "cut.state")
    assert ir.to_proto(resumed.program).SerializeToString() == ir.to_proto(whole.program).SerializeToString()


def test_a_checkpoint_of_another_run_is_refused(trained: Model, tmp_path: Path) -> None:
    state = tmp_path / "run.state"
    checkpoints = Checkpoints(state, {"settings": "other"})
    checkpoints.save(lambda: ({"parameter/a": torch.zeros(2)}, {"phase": "prune", "step": 1}), now=True)
    with pytest.raises(InputError, match="belongs to another run"):
        compress(trained, named(trained, data(200)), checkpoint=state)
    state.write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="cannot be read"):
        compress(trained, named(trained, data(200)), checkpoint=state)


def test_settings_that_contradict_are_refused(trained: Model) -> None:
    with pytest.raises(InputError, match="1 to 8 bits, or 0 for none; not 9"):
        compression(codebook=9)
    with pytest.raises(InputError, match="below 1, not 1"):
        compress(trained, named(trained, data(64)), prune=1.0)
    wrong = named(trained, data(64)) | {"labels": np.full(64, 7)}
    with pytest.raises(DataError, match="label 7 has no class"):
        compress(trained, wrong)
    with pytest.raises(DataError, match=r"labels of shape \[64, 2\] are not classes of an output"):
        compress(trained, named(trained, data(64)) | {"labels": np.zeros((64, 2), np.int64)})


def test_settings_are_words_of_a_toml_file_and_travel_in_the_model(trained: Model) -> None:
    chosen = compression(prune=Pruning(0.5, pattern="2:4"), codebook=3)
    assert lb.Recipe.from_toml(chosen.to_toml()) == chosen
    own = replace(chosen, rules=(*chosen.rules, lb.Rule("fc1.weight", "codebook2:linear:0.02", prune=0.9)))
    assert lb.Recipe.from_toml(own.to_toml()) == own
    small = compress(trained, named(trained, data(64)), prune=0.5, prune_epochs=0, code_epochs=0, value_epochs=0)
    assert lb.Recipe.from_toml(small.metadata["lowbit.recipe"]) == compression(prune=0.5)
    with pytest.raises(InputError, match=r"net\.toml: unknown key 'pruning'"):
        lb.Recipe.from_toml("pruning = 0.5", "net.toml")


def test_a_recipe_of_activations_and_a_schedule_of_training_are_refused(trained: Model) -> None:
    with pytest.raises(UnsupportedError, match=r"'\*' quantizes activations, and a compressed network"):
        compress(trained, named(trained, data(64)), "int8")
    with pytest.raises(InputError, match="compress has no 'average'"):
        compress(trained, named(trained, data(64)), schedule="average=0.9")


def test_constants_that_stay_float_take_two_bytes_where_the_recipe_says_so(trained: Model) -> None:
    recipe = lb.Recipe((lb.Rule("*", "int8 channel:0"),), compression().passes, rest="float16")
    small = compress(trained, named(trained, data(64)), recipe, code_epochs=0.5)
    kinds = [v.const_value.dtype.name for v in small.program.graph.initializers.values() if v.const_value.size == 72]
    assert kinds == ["FLOAT16"]  # the convolution's weights, which are too few for codes
    assert abs(accuracy(small) - accuracy(trained)) < 0.01


def test_a_rule_that_prunes_compares_its_own_weights_and_the_last_rule_wins() -> None:
    model = wide_and_narrow()
    first, second, third = compressible(model.program)
    rules = lb.Rule("*", "codebook3", prune=0.5), lb.Rule(second, prune=0.9), lb.Rule(first, prune=0.0)
    recipe = lb.Recipe(rules)
    names = {name: (name,) for name in (first, second, third)}
    assert recipe.prunings(names) == [(Pruning(0.9), (second,)), (Pruning(0.5), (third,))]
    samples = named(model, data(64), labels=False)
    small = compress(model, samples, recipe, prune_epochs=0, code_epochs=0, value_epochs=0)
    zeros = {row["tensor"]: row.get("sparsity") for row in from_text(small.metadata["lowbit.ledger"])}
    assert zeros[first] is None
    assert zeros[second] == pytest.approx(0.9, abs=0.001)
    assert zeros[third] == pytest.approx(0.5, abs=0.001)


def test_the_program_given_is_left_alone(trained: Model) -> None:
    before = ir.to_proto(trained.program).SerializeToString()
    compress(trained, named(trained, data(64)), prune_epochs=0.5, value_epochs=0.5)
    assert ir.to_proto(trained.program).SerializeToString() == before


def test_a_torch_module_is_taken_as_it_is() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, CLASSES)).eval()
    samples = data(200)
    batches = [(samples["x"][i : i + 50], samples["labels"][i : i + 50]) for i in range(0, 200, 50)]
    small = compress(net, batches, prune=0.5, prune_epochs=0.5, value_epochs=0.5)
    assert accuracy(small) > 0.1
    assert codes_of(small)


def test_a_bare_state_dict_is_compressed_without_a_network(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "a.weight": torch.randn(100, 64, generator=generator).bfloat16(),
        "b.weight": np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32),
        "a.bias": torch.randn(100, generator=generator),
        "steps": torch.tensor(7),
    }
    found = lb.compress_tensors(state, prune=0.9, codebook=4)
    assert found["a.weight"].dtype == torch.bfloat16
    assert found["b.weight"].dtype == np.float32
    assert torch.equal(found["a.bias"], state["a.bias"])
    for name in ("a.weight", "b.weight"):
        assert len(np.unique(np.asarray(torch.as_tensor(found[name]).float()))) <= 16
    assert np.mean(found["b.weight"] == 0) == pytest.approx(0.9, abs=0.03)
    assert pack(found, tmp_path / "state.lowbit") < (100 * 64 * 2 + 200 * 64 * 4) / 16


def test_a_network_with_labels_for_every_step_is_trained_for_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    model = lb.load(net, torch.randn(2, 6, 16))
    x = np.random.default_rng(0).normal(size=(40, 6, 16)).astype(np.float32)
    labels = (x[:, :, 0] > 0).astype(np.int64) + 2 * (x[:, :, 1] > 0)
    chosen = Schedule(prune_epochs=60, code_epochs=20, value_epochs=10, batch=10, distill=0.0)
    small = compress(model, {model.inputs[0].name: x, "labels": labels}, schedule=chosen, prune=0.3)
    classes = next(iter(small.run({model.inputs[0].name: x}).values())).argmax(axis=-1)
    assert (classes == labels).mean() > 0.9  # an untrained network starts at a quarter
