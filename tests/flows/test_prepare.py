"""Training in few bits: what `prepare` gives trains as any module, and what `convert` writes is what was trained."""

import copy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_networks import convolutions, images, network

import lowbit as lb
from lowbit.errors import InputError
from lowbit.network.rectifier import Rectifier
from lowbit.report.ledger import Ledger

X = torch.from_numpy(images(64))
LABELS = torch.arange(64) % 4


class Mixed(nn.Module):
    """Each kind of layer that a batch norm folds into, an Add and a Concat; every second γ negative."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(16, 4, 2, stride=2)
        self.hidden = nn.Linear(4, 8)
        self.head = nn.Linear(8, 4)
        norms = [nn.BatchNorm2d(n) for n in (8, 8, 8, 4)] + [nn.BatchNorm1d(8)]
        self.bn1, self.bn2, self.bn3, self.bn4, self.bn5 = norms
        for norm in norms:
            signs = torch.tensor([1.0, -1.0]).repeat(norm.num_features // 2)
            norm.weight.data = signs * torch.linspace(0.5, 1.5, norm.num_features)
            nn.init.normal_(norm.bias, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.bn1(self.conv(x)))
        b = torch.relu(self.bn2(self.depthwise(a)) + a)
        c = torch.cat([F.relu6(self.bn3(self.grouped(b))), a], 1)
        d = torch.relu(self.bn4(self.up(c))).mean((2, 3))
        logits: Tensor = self.head(torch.relu(self.bn5(self.hidden(d))))
        return logits


@pytest.fixture(scope="module")
def module() -> Mixed:
    torch.manual_seed(0)
    made = Mixed()
    with torch.no_grad():
        for _ in range(20):
            made(X)  # the running statistics come near
    return made.eval()


@pytest.fixture(scope="module")
def mixed(module) -> lb.Model:
    """The module, exported once."""
    return lb.load(module, X)


def logits_of(outputs: Tensor | dict[str, Tensor]) -> Tensor:
    if isinstance(outputs, dict):
        (outputs,) = outputs.values()
    return outputs


def train(prepared: nn.Module, steps: int = 4, rate: float = 0.05) -> float:
    """Some steps on X; the last loss."""
    optimizer = torch.optim.SGD(prepared.parameters(), rate, momentum=0.9)
    for _ in range(steps):
        loss = F.cross_entropy(logits_of(prepared(X)), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def assert_deployed(model: lb.Model, prepared: nn.Module, steps: float = 1e-4) -> None:
    """The file gives what the trained module gives in eval mode, and the same answer on every sample but ties."""
    trained = logits_of(prepared.eval()(X)).numpy()
    (deployed,) = model.run({model.inputs[0].name: X.numpy()}).values()
    assert np.abs(deployed - trained).max() <= steps * np.abs(trained).max()
    best = np.sort(trained, 1)
    tied = best[:, -1] - best[:, -2] <= 1e-6
    assert ((deployed.argmax(1) == trained.argmax(1)) | tied).all()


@pytest.mark.slow
def test_without_quantizers_it_computes_what_the_module_computes(module):
    prepared = lb.prepare(module, X, "w4a4", calibration=X)
    with prepared.network.mode("off"), torch.no_grad():
        assert torch.allclose(prepared(X), module(X), atol=1e-5)
    assert not prepared.training  # as the module


def test_its_state_has_the_names_and_values_of_the_module(module, mixed):
    state = lb.prepare(mixed, X, "w4a4").layers.state_dict()
    for name, value in module.state_dict().items():
        if name in ("bn1.running_mean", "head.bias") or name.endswith((".weight", "running_var")):
            held = state[name] if state[name].shape == value.shape else state[name].T
            assert torch.allclose(held, value, atol=1e-6), name


def low(weights: str, activations: str, range: str = "mse") -> lb.Recipe:
    """The same formats everywhere."""
    specs = lb.TensorSpec(weights, range), lb.TensorSpec(activations, range) if activations != "float" else lb.FLOAT
    return replace(lb.RECIPES["int8-fast"](), rules=(lb.Rule("*", *specs),))


LEARNED = low("int2 channel:0", "uint2", "lsq")


@pytest.mark.parametrize("recipe", ["w4a4", LEARNED], ids=["w4a4", "lsq"])
def test_the_file_computes_what_was_trained(mixed, recipe):
    prepared = lb.prepare(mixed, X, recipe)
    before = train(prepared, 1)
    assert train(prepared, 8) < before
    assert bool((prepared.norms["conv.weight"].norm.weight < 0).any())
    assert_deployed(lb.convert(prepared), prepared)


def test_every_parameter_gets_a_gradient(mixed):
    prepared = lb.prepare(mixed, X, "w4a4")
    F.cross_entropy(prepared(X)["output"], LABELS).backward()
    assert [name for name, p in prepared.named_parameters() if p.grad is None or not p.grad.any()] == []


def kept(module: nn.Module) -> dict[int, Tensor]:
    """What a forward pass keeps for the backward one; each storage once."""
    found: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: found.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        module(X)
    return found


def test_a_training_step_keeps_no_value_in_front_of_a_quantizer():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 2, 3))
    recipe = low("int4 channel:0", "uint4", "lsq")
    sizes = {}
    for name, trains in (("float", module), ("4 bits", lb.prepare(module, X, recipe, calibration=X).train())):
        held = kept(trains).values()
        sizes[name] = sum(t.untyped_storage().nbytes() for t in held if t.shape[:1] == X.shape[:1])
    one = 64 * 32 * 8 * 8 * 4  # bytes of a value between: the batch norm's input, the rounded output of the ReLU
    given, last = X.numel() * 4, 64 * 2 * 6 * 6 * 4
    assert sizes["float"] - given == 2 * one
    assert sizes["4 bits"] - given == 2 * one + (given + one + last) / 2  # 16 bits: where a value lies in its step


def test_a_relu_in_front_of_a_quantizer_passes_the_gradients_that_it_did(mixed):
    prepared = lb.prepare(mixed, X, low("int4 channel:0", "uint4", "lsq"), calibration=X)
    plain = copy.deepcopy(prepared)
    rectifiers = [m for m in plain.modules() if isinstance(m, Rectifier)]
    assert len(rectifiers) == 3  # of 5: bn1's has two readers, one quantizer serves two values of the Concat
    for rectifier in rectifiers:
        (reader,) = rectifier.reader
        assert reader.learner.stops_at_zero()
        reader.learner.behind_relu = False
    for trains in (prepared, plain):
        F.cross_entropy(logits_of(trains(X)), LABELS).backward()
    for (name, ours), (_, theirs) in zip(prepared.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_converting_changes_nothing_in_the_prepared_module(mixed):
    prepared = lb.prepare(mixed, X, "w4a4")
    before = copy.deepcopy(prepared.state_dict())
    lb.convert(prepared)
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    assert prepared.training


@pytest.mark.slow
def test_calibrated_and_not_trained_it_is_static_quantization(module):
    prepared = lb.prepare(module, X[:1], "int8")
    with prepared.calibration():
        for batch in X.split(16):
            prepared(batch)
    assert_deployed(lb.convert(prepared), prepared)


def test_ranges_begin_with_the_first_batch_in_training_mode(mixed):
    prepared = lb.prepare(mixed, recipe=LEARNED)
    quantizers = prepared.network.activations().values()
    before, parameters = [float(q.held()[0]) for q in quantizers], list(prepared.parameters())
    assert not prepared.calibrated
    train(prepared, 1, rate=0.0)
    assert prepared.calibrated
    assert all(float(q.held()[0]) != scale for q, scale in zip(quantizers, before, strict=True))
    assert all(one is other for one, other in zip(prepared.parameters(), parameters, strict=True))  # an optimizer's
    assert_deployed(lb.convert(prepared), prepared)


def test_a_files_folded_batch_norms_are_restored_as_the_same_function():
    model = convolutions()
    prepared = lb.prepare(model, images(64), "w4a4")
    norm = prepared.norms["conv1.weight"].norm
    with prepared.network.mode("off"), torch.no_grad():
        exact = model.run({"x": images(8)})["logits"]
        assert np.allclose(prepared.eval()(X[:8])["logits"].numpy(), exact, atol=1e-5)
    assert float((norm.running_mean.abs() / norm.running_var.sqrt()).max()) < 1  # they were measured
    assert list(prepared.norms) == ["conv1.weight", "conv2.weight"]


@pytest.mark.parametrize("what", ["nothing", 3])
def test_convert_takes_what_prepare_gave(what):
    with pytest.raises(InputError, match="convert takes what prepare gave"):
        lb.convert(what)


def test_an_operator_that_stops_gradients_is_named():
    text = """g (float[N,4] x) => (float[N,3] y) {
        a = MatMul (x, first) b = Hardmax (a) y = MatMul (b, second) }"""
    weights = {"first": np.eye(4, dtype=np.float32), "second": np.ones((4, 3), np.float32)}
    with pytest.warns(UserWarning, match="no gradient passes through Hardmax 'hardmax_1': onnxruntime computes it"):
        prepared = lb.prepare(network(text, **weights), {"x": np.eye(4, dtype=np.float32)}, "w4a4-lsq")
    prepared(torch.eye(4))["y"].sum().backward()
    assert prepared.get_parameter("layers.second").grad.abs().sum() > 0
    assert prepared.get_parameter("layers.first").grad is None


def test_convert_without_ranges_says_how_to_get_them(mixed):
    prepared = lb.prepare(mixed, recipe="w4a4")
    with pytest.raises(InputError, match=r"with prepared.calibration\(\)"):
        lb.convert(prepared)
    with pytest.raises(InputError, match="no ranges"):
        prepared.eval()(X)


def test_preparing_twice_is_refused(mixed):
    with pytest.raises(InputError, match="prepared already"):
        lb.prepare(lb.prepare(mixed, X, "w4a4"), X)


def test_a_weight_that_is_not_finite_is_named(mixed):
    prepared = lb.prepare(mixed, X, "w4a4")
    with torch.no_grad():
        prepared.network.parameter("grouped.weight")[0] = torch.nan
    with pytest.raises(InputError, match=r"4 of 32 values of 'grouped.weight' are NaN"):
        lb.convert(prepared)


# ---- what torch users do with a module ---------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [LEARNED], ids=["lsq"])
def test_a_state_that_is_loaded_gives_the_same_numbers(mixed, recipe):
    trained = lb.prepare(mixed, X, recipe)
    train(trained)
    fresh = lb.prepare(mixed, X[:2] * 3, recipe)
    assert not torch.equal(fresh.eval()(X)["output"], trained.eval()(X)["output"])
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(X)["output"], trained(X)["output"])


@pytest.mark.slow
def test_a_state_tells_that_ranges_are_known(mixed):
    fresh = lb.prepare(mixed, recipe="w4a4")
    fresh.load_state_dict(lb.prepare(mixed, X, "w4a4").state_dict())
    assert_deployed(lb.convert(fresh), fresh)


def test_a_copy_trains_alone(mixed):
    prepared = lb.prepare(mixed, X, "w4a4").eval()
    before = prepared(X)["output"]
    other = copy.deepcopy(prepared).train()
    train(other)
    assert torch.equal(prepared(X)["output"], before)
    assert not torch.equal(other.eval()(X)["output"], before)
    assert_deployed(lb.convert(other), other)


@pytest.mark.slow
def test_it_compiles_whole_and_trains_as_it_does_without_a_compiler():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    recipe = replace(LEARNED, rules=(*LEARNED.rules, lb.Rule("at:input", activations=lb.TensorSpec("uint8", "ema"))))
    prepared = lb.prepare(module, X, recipe, calibration=X).train()
    alone = copy.deepcopy(prepared)
    compiled = torch.compile(prepared, fullgraph=True)
    assert train(compiled) == pytest.approx(train(alone), rel=1e-3)
    assert_deployed(lb.convert(compiled), prepared)


@pytest.mark.slow
def test_it_trains_under_autocast(mixed):
    prepared = lb.prepare(mixed, X, "w4a4")
    optimizer = torch.optim.AdamW(prepared.parameters(), 0.01)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(prepared(X)["output"].float(), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert_deployed(lb.convert(prepared), prepared)


class Structured(nn.Module):
    """Two inputs, one of them optional; outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, factor: Tensor | None = None, quiet: bool = True) -> dict[str, object]:
        y = self.head(x if factor is None else x * factor)
        return {"logits": y, "more": (y.mean(), None)}


@pytest.mark.slow
def test_it_is_called_as_the_module_and_returns_what_it_returned():
    x, factor = torch.randn(16, 8), torch.rand(16, 1)
    prepared = lb.prepare(Structured(), (x, factor), low("int8", "uint8"), calibration={"x": x, "factor": factor})
    found = prepared(x, factor=factor, quiet=False)
    assert list(found) == ["logits", "more"]
    assert found["logits"].shape == (16, 4)
    assert found["more"][0].shape == ()
    assert found["more"][1] is None


def test_frozen_statistics_stay_and_estimated_ones_are_those_of_the_data(mixed):
    prepared = lb.prepare(mixed, X, LEARNED)
    norm = prepared.norms["conv.weight"].norm
    prepared.freeze_batchnorm()
    before = norm.running_mean.clone()
    train(prepared, 1)
    assert torch.equal(norm.running_mean, before)
    prepared.estimate_batchnorm(X)
    seen: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    prepared.eval()(X)
    hook.remove()
    assert torch.allclose(norm.running_mean, seen[0].mean((0, 2, 3)), atol=1e-5)
    assert norm.frozen
    assert_deployed(lb.convert(prepared), prepared)


# ---- every format ------------------------------------------------------------------------------------------------


def wide() -> lb.Model:
    """Layers whose weights are enough to store in any format; a batch norm with negative γ behind each convolution."""
    rng = np.random.default_rng(0)
    norms = {
        f"n{i}{part}": value
        for i, n in ((1, 64), (2, 32))
        for part, value in (
            ("s", np.where(np.arange(n) % 2, 1, -1) * rng.uniform(0.5, 1.5, n)),
            ("b", rng.normal(size=n) / 4),
            ("m", rng.normal(size=n) / 4),
            ("v", rng.uniform(0.5, 1.5, n)),
        )
    }
    return network(
        """
        wide (float[N,3,8,8] x) => (float[N,4] logits) {
            a = Conv <pads = [1,1,1,1]> (x, w1)
            an = BatchNormalization (a, n1s, n1b, n1m, n1v)
            b = Relu (an)
            c = Conv (b, w2)
            cn = BatchNormalization (c, n2s, n2b, n2m, n2v)
            f = GlobalAveragePool (cn)
            g = Flatten (f)
            h = Gemm <transB = 1> (g, w3, b3)
            logits = Gemm <transB = 1> (h, w4, b4)
        }""",
        w1=rng.normal(size=(64, 3, 3, 3)) / 5,
        w2=rng.normal(size=(32, 64, 1, 1)) / 8,
        w3=rng.normal(size=(64, 32)) / 6,
        b3=rng.normal(size=64) / 10,
        w4=rng.normal(size=(4, 64)) / 8,
        b4=rng.normal(size=4) / 10,
        **norms,
    )


def trained_file(model: lb.Model, recipe: lb.Recipe | str) -> tuple[lb.Model, lb.Prepared]:
    prepared = lb.prepare(model, X, recipe)
    assert np.isfinite(train(prepared, 3, rate=0.02))
    return lb.convert(prepared), prepared


def assert_any_format(format: str) -> None:
    file, prepared = trained_file(wide(), low(format, "float"))
    assert prepared.network.constants()["w2"][1].stored is not None
    assert_deployed(file, prepared, 1e-3)


@pytest.mark.parametrize("format", ["mxfp4"])
def test_weights_of_this_format_are_deployed_as_trained(format):
    assert_any_format(format)


def test_a_basis_of_each_channel_takes_the_batch_norm_and_is_deployed_as_trained():
    file, prepared = trained_file(wide(), low("bases2 channel:0", "float", "lqnets"))
    assert "w2" in prepared.norms
    assert_deployed(file, prepared, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("format", lb.FORMATS)
def test_weights_of_any_format_are_deployed_as_trained(format):
    assert_any_format(format)


def assert_widths(bits: int, activations: str) -> None:
    weights = "binary channel:0" if bits == 1 else f"int{bits} channel:0"
    file, prepared = trained_file(wide(), low(weights, activations))
    assert_deployed(file, prepared)
    rows = Ledger.of(file).rows
    assert {row["bits"] for row in rows if row["role"] == "activation" and row["status"] == "quantized"} == {bits}


@pytest.mark.parametrize("signed", ["uint", "int"])
def test_activations_of_three_bits_deploy_as_trained(signed):
    assert_widths(3, f"{signed}3")


@pytest.mark.slow
@pytest.mark.parametrize(("signed", "bits"), [("uint", 1), *product(("uint", "int"), range(2, 9))])
def test_activations_of_any_width_deploy_as_trained(signed, bits):
    assert_widths(bits, f"{signed}{bits}")


@pytest.mark.parametrize(("recipe", "most", "channels"), [("fbgemm", 127, 64), ("qnnpack", 255, 1)])
def test_recipes_of_torch_backends(recipe, most, channels):
    file, prepared = trained_file(wide(), recipe)
    assert_deployed(file, prepared)
    assert prepared.network.activations()["x"].format.grid.maximum == most
    assert prepared.network.constants()["w1"][1].stored.scale_values().numel() == channels
    assert file.metadata["lowbit.parity"].count('"read_back": "onnxruntime"') == 1
