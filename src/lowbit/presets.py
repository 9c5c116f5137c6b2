"""The presets: recipes by name, and how a user's word for a recipe is read."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from lowbit.errors import InputError
from lowbit.numerics import Format, Int
from lowbit.recipe import DYNAMIC, FLOAT, PREPARE, Recipe, Rule, TensorSpec
from lowbit.targets import find_target


def _preset(
    weights: "TensorSpec | str",
    activations: "TensorSpec | str" = FLOAT,
    steps: tuple[str, ...] = (),
    solve: str = "nearest",
) -> Callable[[str], Recipe]:
    """A recipe of one rule, for any target. A range alone stands for the target's own format with this range."""

    def recipe(target: str = "onnxruntime") -> Recipe:
        own = find_target(target)
        kept = tuple(step for step in steps if step != "leave_in_float" or not own.whole)
        first = TensorSpec(own.weights, weights, solve) if isinstance(weights, str) else weights
        second = TensorSpec(own.activations, activations) if isinstance(activations, str) else activations
        rule = Rule("*", first, second)
        return Recipe((rule,), PREPARE + kept, target)

    return recipe


_INT4 = TensorSpec("int4 channel:0", solve="adaround")
_END = "minmax", "adaround"
_RECONSTRUCT = ("smooth", "reconstruct", "correct_bias")


def _low_bits(
    weights: TensorSpec,
    activation_bits: int,
    steps: tuple[str, ...],
    ends: tuple[str, str],
    ranges: tuple[str, str] = ("auto", "auto"),
) -> Callable[[str], Recipe]:
    """Few bits inside, the target's own 8 at both ends of the network, as the literature has it.

    ends     range and solver of the first and the last weight
    ranges   of activations, inside and at the ends
    """

    def recipe(target: str = "onnxruntime") -> Recipe:
        own = find_target(target)
        assert isinstance(own.activations.grid, Int)
        inside = replace(own.activations, grid=Int(activation_bits, own.activations.grid.signed))
        wide = TensorSpec(own.activations, ranges[1])
        end = TensorSpec(own.weights, *ends), wide
        rules = [Rule("*", weights, TensorSpec(inside, ranges[0])), Rule("at:input", *end), Rule("at:output", *end)]
        if "split_residuals" in steps:
            rules.insert(1, Rule("at:residual", None, wide))
        return Recipe(tuple(rules), PREPARE + steps, target)

    return recipe


def _learned(bits: int, activation_bits: int | None = None) -> Callable[[str], Recipe]:
    """Few bits that learn by LSQ in training, as the literature counts them: in what layers multiply.

    8 bits in the sums of residuals too; these ranges follow the extremes. Weights in whole numbers up to 127: a bias is
    rounded to a multiple of the product of scales, which integers of 2 bits make so large that codes of 8 bits behind
    it differ by two.
    """
    weights = TensorSpec(f"{'int' if bits == 8 else 'lloyd'}{bits} channel:0", "lsq")
    learned = "ema:minmax" if activation_bits == 8 else "lsq"
    ends, ranges = ("ema:minmax", "nearest"), (learned, "ema:minmax")
    return _low_bits(weights, activation_bits or bits, ("split_residuals",), ends, ranges)


def _binary(target: str = "onnxruntime") -> Recipe:
    """Weights of two values for each channel, as XNOR-Net's; 8 bits at both ends; everything is computed in float."""
    end = TensorSpec(find_target(target).weights, "ema:minmax")
    rules = Rule("*", TensorSpec("binary channel:0", "xnor"), FLOAT), Rule("at:input", end), Rule("at:output", end)
    return Recipe(rules, PREPARE, target)


def _dynamic(target: str = "onnxruntime") -> Recipe:
    """Without data. Weights of MatMul and Gemm have zeros, which cost their kernels no time; those of LSTM cannot."""
    symmetric = find_target(target).weights
    affine = TensorSpec(replace(symmetric, zero_point=True), "mse")
    rules = Rule("*", TensorSpec(symmetric, "mse"), DYNAMIC), Rule("op:MatMul", affine), Rule("op:Gemm", affine)
    return Recipe(rules, (*PREPARE, "normalize", "correct_recurrent_bias"), target)


RECIPES: Mapping[str, Callable[..., Recipe]] = MappingProxyType(
    {
        # 8 bits, in the formats of the target.
        "int8": _preset("minmax", "auto", ("smooth", "correct_bias", "leave_in_float")),
        # For transformers, whose normalization layers make some channels much larger than others: a factor for each.
        # MiniLM's outputs: 21.9 dB, `int8` 18.9.
        "int8-normalized": _preset("minmax", "auto", ("smooth", "normalize", "correct_bias", "leave_in_float")),
        # The same, where ranges of each input make up for their time: docs/dynamic.md.
        "int8-mixed": _preset(
            "minmax", "auto", ("smooth", "normalize", "choose_dynamic", "correct_bias", "leave_in_float")
        ),
        # What int8 can gain without labels; takes two to three times as long. Each step stays only where it helps.
        "int8-repaired": _preset("minmax", "auto", ("smooth", "equalize", "correct_bias", "leave_in_float"), "gptq"),
        # The same by the extremes of the calibration data alone: nothing is tried out, nothing corrected.
        "int8-fast": _preset("minmax", "minmax"),
        # No data: 8-bit weights, and activations in uint8 whose range each input has for itself.
        "int8-dynamic": _dynamic,
        "int8-weights": _preset("minmax"),
        # 4-bit weights per output channel, computed in integers. Nothing is left in float.
        "w4a8": _low_bits(_INT4, 8, _RECONSTRUCT, _END),
        # 4 bits in every layer, solved once: quick to make, and the base of mixed precision. Top-1:
        # ResNet-20 91.65 % (float 91.55, 2,000 images), SqueezeNet 56.0 (57.3), MobileNet v1 0.25 39.3 % (45.3).
        "w4a8-fast": _preset(TensorSpec("int4 channel:0", solve="gptq"), "auto", ("smooth", "correct_bias")),
        "w4a4": _low_bits(_INT4, 4, _RECONSTRUCT, _END),
        # For training: see docs/training.md for what each reaches.
        **{"w8a8-lsq": _learned(8), "w4a4-lsq": _learned(4), "w3a3": _learned(3), "w2a2": _learned(2)},
        **{"w4a8-lsq": _learned(4, 8), "w2a8": _learned(2, 8), "w1": _binary},
        # What torch's static quantization makes for these backends: histograms, and moving averages while training.
        "fbgemm": _preset(TensorSpec("int8 channel:0", "ema:minmax"), TensorSpec("uint7", "ema:mse")),
        "qnnpack": _preset(TensorSpec("int8", "ema:minmax"), TensorSpec("uint8", "ema:mse")),
        # For onnxruntime's MatMulNBits, which rounds activations to int8 in blocks of 32. MiniLM's outputs: 15.4 dB.
        "w4a8-blocks": _preset(TensorSpec("int4 group:32", solve="gptq"), TensorSpec("int8 group:32", "minmax")),
        # Weights alone, fitted to data. With zeros MiniLM's outputs have 16.5 dB, without 15.3, for 2 % more bytes.
        "int4-gptq": _preset(TensorSpec("uint4 group:32", solve="gptq")),
        # Weights alone, bounds by least squared error; everything is computed in float.
        "int4-weights": _preset(TensorSpec("int4 group:32")),
        "mxfp4-weights": _preset(TensorSpec("mxfp4")),
        "nf4-weights": _preset(TensorSpec("nf4")),
        "codebook4-weights": _preset(TensorSpec("codebook4")),
    }
)


def find_recipe(recipe: "str | Path | Format | Recipe", target: str | None = None) -> Recipe:
    """A preset by name, a TOML file by path, a format or its words for all weights, or a Recipe as it is.

    `target` overrides the recipe's own.
    """
    if isinstance(recipe, Recipe):
        return recipe if target is None else replace(recipe, target=target)
    if not isinstance(recipe, (str, Path, Format)):
        raise InputError(f"recipe {recipe!r} is neither a name, a file, a Format nor a Recipe.")
    if isinstance(recipe, Format) or (str(recipe) not in RECIPES and Path(recipe).suffix != ".toml"):
        try:
            weights = TensorSpec(recipe if isinstance(recipe, Format) else str(recipe))
        except InputError as error:
            if near := [name for name in RECIPES if str(recipe).lower() in name]:
                meant = "' or '".join(near)
                raise InputError(f"recipe '{recipe}' does not exist. Did you mean '{meant}'?") from None
            raise InputError(
                f"recipe '{recipe}' does not exist. Presets are: {', '.join(RECIPES)}; or give a .toml file, or a "
                f"format for the weights, as 'int4 group:64'. As a format: {error}"
            ) from None
        return _preset(weights)(target or "onnxruntime")
    if str(recipe) in RECIPES:
        return RECIPES[str(recipe)](target or "onnxruntime")
    try:
        text = Path(recipe).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe '{recipe}' cannot be read: {error}.") from None
    return find_recipe(Recipe.from_toml(text, str(recipe)), target)
