"""A recipe says what becomes of each tensor: rules over layer names, read top to bottom, the last match wins.

A recipe is a value: `==`, `repr` that can be pasted back, TOML that round-trips and travels inside the deployed file.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from json import dumps
from typing import Any

import tomli_w

from lowbit.errors import InputError, UnsupportedError, check_name
from lowbit.graph import PASSES
from lowbit.numerics import UINT8, Format, Int, parse_format, spell_format
from lowbit.ranges import MSE, MinMax, Range, parse_range, range_words
from lowbit.solve import NEED_MOMENTS, SOLVERS
from lowbit.solve.prune import Pruning
from lowbit.targets import TARGETS, find_target

_MSE = MSE()
IMPROVE = (
    "smooth",
    "normalize",
    "choose_dynamic",
    "equalize",
    "equalize_without_ceilings",
    "reconstruct",
    "learn_ranges",
    "reestimate_batchnorm",
    "correct_bias",
    "correct_recurrent_bias",
    "leave_in_float",
)  # passes that look at the calibration data
_NEED_NO_DATA = ("normalize", "correct_recurrent_bias")  # made-up inputs tell them enough


@dataclass(frozen=True, init=False)
class TensorSpec:
    """What a tensor is stored in, where it is clipped, and how its codes are found.

    format, range   values, or their words: TensorSpec("int4 group:64", "percentile:99.99"). None, or "float": the
                    tensor stays float, and there is nothing else to say
    solve           of a weight: a name in lowbit.solve.SOLVERS
    dynamic         of an activation: its range is measured on each input, not at calibration
    """

    format: Format | None
    range: Range
    solve: str
    dynamic: bool

    def __init__(
        self, format: "Format | str | None", range: "Range | str" = _MSE, solve: str = "nearest", dynamic: bool = False
    ) -> None:
        if not isinstance(format, (Format, str, type(None))):
            raise InputError(f"format {format!r} is neither a Format nor its words, as 'int4 group:64'.")
        check_name("solver", solve, SOLVERS)
        if not isinstance(dynamic, bool):
            raise InputError(f"dynamic={dynamic!r} is neither True nor False.")
        kind = None if format is None or format == "float" else parse_format(format)
        chosen = parse_range(range)
        range_words(chosen)  # a range without words could not be written with the recipe
        if kind is None and (chosen, solve, dynamic) != (_MSE, "nearest", False):
            raise InputError(f"a tensor in float has neither range nor solver: {range!r}, {solve!r}. Name a format.")
        for name, value in (("format", kind), ("range", chosen), ("solve", solve), ("dynamic", dynamic)):
            object.__setattr__(self, name, value)


FLOAT = TensorSpec(None)
DYNAMIC = TensorSpec(UINT8, MinMax(), dynamic=True)  # what DynamicQuantizeLinear computes


@dataclass(frozen=True, init=False)
class Rule:
    """What happens to the layers whose name matches; None leaves what earlier rules said.

    layers                a glob over a layer's names: its ONNX node, its weight tensor (with or without '.weight'), or
                          'op:Conv'. One that begins with 'state:' speaks of states only: 'state:*.h' of all recurrent
                          layers, 'state:lstm_1.c' of one
    weights, activations  specs, or the words of a format: Rule("head.*", "codebook:4")
    prune                 a Pruning, or the share of the weights that become zero. Weights that one rule prunes are
                          compared with each other
    """

    layers: str
    weights: TensorSpec | None
    activations: TensorSpec | None
    prune: Pruning | None

    def __init__(
        self,
        layers: str = "*",
        weights: "TensorSpec | Format | str | None" = None,
        activations: "TensorSpec | Format | str | None" = None,
        prune: "Pruning | float | None" = None,
    ) -> None:
        if not isinstance(layers, str):
            raise InputError(f"a rule's layers are a glob over their names, as 'encoder.*', not {layers!r}.")
        object.__setattr__(self, "layers", layers)
        if not isinstance(prune, (Pruning, int, float, type(None))) or isinstance(prune, bool):
            raise InputError(f"rule '{layers}': prune={prune!r} is neither a share of the weights nor a Pruning.")
        object.__setattr__(self, "prune", Pruning(prune) if isinstance(prune, (int, float)) else prune)
        for name, spec in (("weights", weights), ("activations", activations)):
            if not isinstance(spec, (TensorSpec, Format, str, type(None))):
                raise InputError(
                    f"rule '{layers}': {name}={spec!r} is neither a format, its words nor a TensorSpec. A format and "
                    "a range together are TensorSpec('uint8', 'minmax')."
                )
            object.__setattr__(self, name, TensorSpec(spec) if isinstance(spec, (Format, str)) else spec)
        if self.of_states and (self.weights or self.prune or not self.activations or not _is_known(self.activations)):
            raise InputError(
                f"rule '{layers}': a state has activations alone, in a format whose scale needs no data, as "
                "'int8 scale:2^-7', 'fp16' or 'float'."
            )
        if self.weights is not None and self.weights.dynamic:
            raise InputError(f"rule '{layers}': weights cannot be dynamic, they are the same at every input.")
        if self.activations is not None and self.activations.solve != FLOAT.solve:
            raise InputError(
                f"rule '{layers}': solver '{self.activations.solve}' serves weights only; activations are rounded to "
                "the nearest code at every input. Leave out solve."
            )

    def to_toml(self) -> str:
        """Lines that may stand at the end of a recipe; each spec on a line of its own, defaults left out."""
        specs = {"weights": self.weights, "activations": self.activations}
        told: dict[str, Any] = {} if self.layers == "*" else {"layers": self.layers}
        told |= {key: _spell(spec) for key, spec in specs.items() if spec is not None}
        if self.prune is not None:
            told["prune"] = self.prune.told()
        return "[[rules]]\n" + "".join(f"{key} = {_inline(value)}\n" for key, value in told.items())

    @property
    def of_states(self) -> bool:
        """Whether it speaks of the states of recurrent layers."""
        return self.layers.startswith("state:")

    def matches(self, names: Iterable[str]) -> bool:
        """Whether it speaks of the layer that goes by these names."""
        return any(fnmatchcase(name, self.layers) for name in names)


@dataclass(frozen=True)
class Recipe:
    """Rules, the passes that run before them, and the target they are for. All names exist: InputError otherwise.

    passes   names in lowbit.graph.PASSES, in order, and in IMPROVE, which also look at the calibration data
    rest     what constants that stay float are stored in: "float32", "float16", or float32 with 1 … 23 bits of
             mantissa, as "mantissa:7", whose zeros cost nothing in a .lowbit file; computed is in float32
    ratio    of `compress`: float32 bytes of the parameters over bytes of the packed file. Weights are then multiples of
             a step, as fine as that allows. 0: formats decide
    """

    rules: tuple[Rule, ...]
    passes: tuple[str, ...] = ()
    target: str = "onnxruntime"
    rest: str = "float32"
    ratio: float = 0.0

    def __post_init__(self) -> None:
        for name, values, kind, what in (
            ("rules", self.rules, Rule, "Rules"),
            ("passes", self.passes, str, "names of passes"),
        ):
            if not isinstance(values, (tuple, list)) or not all(isinstance(value, kind) for value in values):
                raise InputError(f"a recipe's {name} are a tuple of {what}, not {values!r}.")
            object.__setattr__(self, name, tuple(values))
        for name in self.passes:
            check_name("pass", name, (*PASSES, *IMPROVE))
        find_target(self.target)
        kept = re.fullmatch(r"float32|float16|mantissa:(\d+)", self.rest) if isinstance(self.rest, str) else None
        if kept is None or (kept[1] and not 1 <= int(kept[1]) <= 23):
            raise InputError(f"rest={self.rest!r} is none of 'float32', 'float16', and 'mantissa:1' to 'mantissa:23'.")
        if not isinstance(self.ratio, (int, float)) or (self.ratio and not self.ratio > 1):
            raise InputError(f"a ratio is how many times smaller the file should be, above 1; not {self.ratio!r}.")

    @property
    def mantissa_bits(self) -> int:
        """Bits of mantissa that constants which stay float keep."""
        return int(self.rest.partition(":")[2] or 23)

    def check_deployable(self) -> None:
        """Raise UnsupportedError for what can be simulated only, before anything is calibrated."""
        target = find_target(self.target)
        openvino = target.engine == "openvino"
        asking = [f"rule '{rule.layers}'" for rule in self.rules if (rule.activations or FLOAT).dynamic]
        asking += ["step 'choose_dynamic'"] * ("choose_dynamic" in self.passes)
        if asking and not target.dynamic:
            able = [name for name, other in TARGETS.items() if other.dynamic]
            raise UnsupportedError(
                f"{asking[0]}: target '{self.target}' has no kernels that measure the range of an activation "
                f"at each input. Use static ranges (preset 'int8'), or a target that has them: {', '.join(able)}."
            )
        if asked := [rule.layers for rule in self.rules if rule.of_states]:
            raise UnsupportedError(
                f"rule '{asked[0]}': states in other formats than the target's can be simulated, but no engine "
                "computes them. Leave the rule out, or use lowbit.simulation."
            )
        for rule, spec in ((rule, rule.activations or FLOAT) for rule in self.rules):
            if spec.dynamic and spec != DYNAMIC:
                raise UnsupportedError(
                    f"rule '{rule.layers}': a file measures ranges at each input by DynamicQuantizeLinear, which is "
                    f"uint8 from the least to the greatest value, not {_spell(spec)}. Use "
                    "TensorSpec('uint8', 'minmax', dynamic=True); lowbit.simulation takes any."
                )
            if openvino and spec.format is not None and isinstance(grid := spec.format.grid, Int) and grid.bits == 16:
                raise UnsupportedError(
                    f"rule '{rule.layers}': OpenVINO computes other numbers with 16-bit activations (uint16 always, "
                    "int16 beyond the calibrated range). Use 15 bits, or another target."
                )

    def specs(self, names: Iterable[str]) -> tuple[TensorSpec, TensorSpec]:
        """(weights, activations) of the layer that goes by these names; the last matching rule wins."""
        names = tuple(names)
        weights = activations = FLOAT
        for rule in self.rules:
            if rule.matches(names):
                weights = rule.weights or weights
                activations = rule.activations or activations
        return weights, activations

    def state(self, names: Iterable[str], format: Format) -> TensorSpec:
        """What becomes of the state that goes by these names: the last rule of it, or the target's format."""
        names = tuple(names)
        told = [rule.activations for rule in self.rules if rule.of_states and rule.matches(names)]
        return told[-1] or FLOAT if told else TensorSpec(format)

    def prunings(self, layers: Mapping[str, Sequence[str]]) -> list[tuple[Pruning, tuple[str, ...]]]:
        """How weights are pruned, and those that are compared with each other. layers: weight → names of its layer"""
        found: dict[int, list[str]] = {}
        for weight, names in layers.items():
            matching = [n for n, rule in enumerate(self.rules) if rule.prune is not None and rule.matches(names)]
            if matching:
                found.setdefault(matching[-1], []).append(weight)
        told = [(self.rules[n].prune, tuple(weights)) for n, weights in found.items()]
        return [(prune, weights) for prune, weights in told if prune is not None and prune.sparsity]

    def pruned(self, prune: "Pruning | float") -> "Recipe":
        """The same recipe with this pruning in all its rules that prune, or in a new one for all layers.

        A share alone leaves the rules' patterns and scopes.
        """
        if not any(rule.prune for rule in self.rules):
            return replace(self, rules=(*self.rules, Rule("*", prune=prune)))

        def changed(rule: Rule) -> Rule:
            if rule.prune is None:
                return rule
            new = prune if isinstance(prune, Pruning) else replace(rule.prune, sparsity=prune)
            return Rule(rule.layers, rule.weights, rule.activations, new)

        return replace(self, rules=tuple(map(changed, self.rules)))

    def keep_float(self, *layers: str) -> "Recipe":
        """The same recipe with these layers (globs) left in float."""
        return replace(self, rules=(*self.rules, *(Rule(layer, FLOAT, FLOAT) for layer in layers)))

    def looks_at_data(self) -> str | None:
        """Why it cannot do without calibration data, in words; None where it needs none."""
        for rule in self.rules:
            if rule.activations is not None and rule.activations.format is not None and not rule.activations.dynamic:
                return f"the recipe quantizes activations (rule '{rule.layers}'), whose ranges are measured on data"
            if rule.weights is not None and rule.weights.format is not None and rule.weights.solve in NEED_MOMENTS:
                return f"the solver '{rule.weights.solve}' (rule '{rule.layers}') fits weights to calibration data"
        looking = [name for name in self.passes if name in IMPROVE and name not in _NEED_NO_DATA]
        return f"the recipe's pass '{looking[0]}' looks at calibration data" if looking else None

    def to_toml(self) -> str:
        given = {"passes": list(self.passes)} | {key: getattr(self, key) for key in ("target", "rest", "ratio")}
        head = tomli_w.dumps({key: value for key, value in given.items() if value not in (getattr(Recipe, key), [])})
        return "\n".join([head, *(rule.to_toml() for rule in self.rules)])

    @staticmethod
    def from_toml(text: str, source: str = "recipe") -> "Recipe":
        """Read what `to_toml` wrote, or what a person did; InputError says which key is wrong."""
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{source} is not TOML: {error}.") from None
        _check_keys(table, ("target", "passes", "rest", "ratio", "rules"), source)
        rows = table.get("rules", [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{source}: rules are tables, each under [[rules]], not {rows!r}.")
        rules = []
        for row in rows:
            where = f"{source}, rule '{row.get('layers', '*')}'"
            _check_keys(row, ("layers", "weights", "activations", "prune"), where)
            given = {key: _parse(value) for key, value in row.items() if key in ("weights", "activations")}
            if isinstance(prune := row.get("prune"), dict):
                _check_keys(prune, ("sparsity", "scope", "pattern"), where)
                prune = Pruning(**prune)
            rules.append(Rule(row.get("layers", "*"), **given, prune=prune))
        return Recipe(**table | {"rules": tuple(rules)})


def _is_known(spec: TensorSpec) -> bool:
    """Whether what it makes of a value needs no calibration."""
    kind = spec.format
    return spec.dynamic or kind is None or kind.block is None or (kind.has_fixed_scale and not kind.zero_point)


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := table.keys() - known:
        raise InputError(f"{where}: unknown key '{min(unknown)}'. Keys are: {', '.join(sorted(known))}.")


def _spell(spec: TensorSpec) -> str | dict[str, Any]:
    if spec.format is None:
        return "float"
    told = {"format": spell_format(spec.format)}
    if spec.range != FLOAT.range:
        told["range"] = range_words(spec.range)
    return told | {key: value for key in ("solve", "dynamic") if (value := getattr(spec, key)) != getattr(FLOAT, key)}


def _inline(value: Any) -> str:
    """A string, a number or a table of them as TOML, on one line; TOML writes strings and numbers as JSON does."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(inner)}" for key, inner in value.items()) + " }"
    return dumps(value, ensure_ascii=False)


def _parse(row: Any) -> TensorSpec:
    if not isinstance(row, dict):
        return TensorSpec(row)
    _check_keys(row, ("format", "range", "solve", "dynamic"), f"spec {row}")
    if "format" not in row:
        raise InputError(f"spec {row} says no format. Give one in words, as 'int4 group:64', or 'float'.")
    return TensorSpec(**row)


PREPARE = (
    *("simplify_reshapes", "merge_repeats", "recognize_operators", "space_to_depth", "fuse_pad"),
    *("fold_batchnorm", "fold_scales", "fuse_gemm", "finite_masks"),
)
