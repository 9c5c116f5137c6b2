"""Mixed precision: the format of each layer, so that the outputs change least under a budget of bits or bytes.

    minimise    Σ_l e(l, f_l)       e: squared error that layer l in format f_l adds to the outputs, of their power
    subject to  Σ_l b(l, f_l) ≤ B   b: bytes in the file

`repair.sensitivity` predicts e for all formats from one set of backward passes, `solve.program` finds the formats, and
then real networks correct the prediction. Sources: HAWQ-V3 (Yao et al. 2021, arXiv 2011.10680), Wu et al. 2020
(arXiv 2004.09602), section 6.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil, inf
from pathlib import Path
from typing import Any

from lowbit.deploy.compact import compact
from lowbit.deploy.export import export, ledger
from lowbit.engines.compile import serialize
from lowbit.errors import InputError, TooSmallError
from lowbit.flows.latency_budget import within_latency
from lowbit.flows.prices import FORMATS, Prices, asked_of, draft_of, prices_of, solved_by
from lowbit.flows.ptq import MEMORY, Stage, _silent, given, observed
from lowbit.flows.real_networks import RealNetwork, RealNetworks
from lowbit.metadata import to_text
from lowbit.network.network import Network
from lowbit.numerics import Format, parse_format
from lowbit.recipe import Recipe, Rule
from lowbit.repair.wider import literal
from lowbit.solve.program import Option, Program

TRIES = 4  # real networks
NOTES = 1024  # bytes that a file's notes take beside recipe and ledger: what was done, the proof


def mixed_precision(
    model: Any,
    calibration: Any,
    recipe: "str | Path | Format | Recipe | None" = None,
    *,
    bits: float | None = None,
    size: float | None = None,
    latency: float | None = None,
    loss: str = "squares",
    target: str | None = None,
    memory: int = MEMORY,
    stage: Stage = _silent,
) -> Recipe:
    """The recipe with a format for each layer, so that the outputs change least and the file keeps a budget.

    model, calibration, target, memory, stage   as in `quantize`, which takes the result
    recipe   all but the formats that the budget decides: how codes and ranges are found, passes, activations; None:
             "w4a8-fast", or "int8" for a latency
    bits     mean bits a weight: the file is no larger than if all weights had so many
    size     bytes of the file, as a share of the float file's
    latency  of one sample on one thread, as a share of the float network's: which layers stay in float
    loss     what is kept small, as in `sensitivity`

    TooSmallError names the nearest budget that can be met.
    """
    budgets = {
        name: value for name, value in (("bits", bits), ("size", size), ("latency", latency)) if value is not None
    }
    if len(budgets) != 1:
        raise InputError(f"mixed precision needs one budget, as bits=5, size=0.2 or latency=0.6, not {len(budgets)}.")
    ((name, budget),) = budgets.items()
    if not 0 < budget < (inf if latency is None else 1):
        least = "a positive number" if latency is None else "a share between 0 and 1"
        raise InputError(f"{name}={budget!r}: a budget of {name} is {least}, as bits=5, size=0.2 or latency=0.6.")
    recipe = recipe or ("w4a8-fast" if latency is None else "int8")
    model, data, base = given(model, calibration, recipe, target)
    base.check_deployable()
    if latency is not None:
        return within_latency(observed(model, data, base, memory, stage), base, model, latency, loss, stage)
    draft = draft_of(base)
    seen = observed(model, data, draft, memory, stage)
    stage("pricing formats")
    prices = prices_of(seen, FORMATS, loss)
    search = _Search(RealNetworks(seen, loss, _file_bytes, stage), draft, prices, len(serialize(model.program)))
    found = search.run(bits, size)
    return found if draft == base else replace(solved_by(found, "gptq", "adaround"), passes=base.passes)


@dataclass
class _Search:
    """Formats by the integer program, held against real networks.

    real          networks, and the bytes of their files
    float_bytes   of the float file
    trust         format → factor of its predicted errors, from real networks so far
    extra         bytes that files take beyond the predicted
    """

    real: RealNetworks
    base: Recipe
    prices: Prices
    float_bytes: int
    trust: dict[str, float] = field(default_factory=dict)
    extra: float = 0.0

    def __post_init__(self) -> None:
        self.layers = self.prices.layers()
        self.words = list(dict.fromkeys(word for several in self.prices.weights.values() for word in several))
        self.files = {word: self._uniform(word) for word in self.words}

    def run(self, bits: float | None, size: float | None) -> Recipe:
        if bits is not None and bits < (fewest := min(map(_code_bits, self.words))):
            raise TooSmallError(
                f"no file has a mean of {bits:g} bits a weight with formats that the target runs. Ask for {fewest} or "
                "more."
            )
        limit = self._bytes_of(bits) if bits is not None else (size or 0.0) * self.float_bytes - NOTES

        def plan() -> tuple[Recipe, dict[str, str]] | None:
            chosen = self._program().least("error", {"bytes": limit - self.extra})
            return None if chosen is None else (self._recipe(words := self._named(chosen)), words)

        self.real.follow(TRIES, "trying formats", plan, self._learn)
        kept = self.real.within(limit)
        if bits is not None:  # no mixture may be so small where bytes are mostly notes
            self.real.stage("trying one format for all")
            kept.append(self.real.make(self._recipe(self._alike(bits, limit))))
        if not kept:
            kept = [self.real.make(self._recipe(self._named(self._program().least("bytes") or {})))]
            if kept[0].taken > limit:
                near = ceil(1000 * (kept[0].taken + NOTES) / self.float_bytes) / 1000
                asked = f"{size:g} of the float file's {self.float_bytes:,} bytes"
                raise TooSmallError(f"no file is as small as {asked}. Ask for {near:g} or more.")
        return min(kept, key=lambda tried: tried.error).recipe

    def _bytes_of(self, bits: float) -> float:
        """Of the file in which all weights have so many bits; between whole numbers in proportion."""
        known = {_code_bits(word): size for word, size in sorted(self.files.items(), key=lambda pair: pair[1])[::-1]}
        low = max((b for b in known if b <= bits), default=min(known))
        high = min((b for b in known if b > low), default=low)
        slope = (known[high] - known[low]) / (high - low) if high > low else 0.0
        return known[low] + (bits - low) * slope

    def _uniform(self, word: str) -> int:
        """Bytes of the file in which all weights have this format."""
        network = self.prices.network
        for name, several in self.prices.weights.items():
            network.constants()[name][1].store(several[word][0] if word in several else next(iter(several.values()))[0])
        return _file_bytes(network, self.base)

    def _stored(self, layer: str, word: str) -> float:
        """Bytes of a layer's weights in a format, with its share of the nodes that this format needs in the file."""
        nodes = (self.files[word] - self._codes(word)) / len(self.prices.weights)
        return sum(self.prices.weights[name][word][0].bits / 8 + nodes for name in self.layers[layer])

    def _codes(self, word: str) -> float:
        return sum(several[word][0].bits / 8 for several in self.prices.weights.values() if word in several)

    def _words(self, layer: str) -> list[str]:
        return list(self.prices.weights[self.layers[layer][0]])

    def _error(self, layer: str, word: str) -> float:
        return self.trust.get(word, 1.0) * sum(self.prices.weights[name][word][1] for name in self.layers[layer])

    def _program(self) -> Program:
        def option(layer: str, word: str) -> Option:
            return Option({"error": self._error(layer, word), "bytes": self._stored(layer, word)})

        return Program({layer: [option(layer, word) for word in self._words(layer)] for layer in self.layers})

    def _recipe(self, words: Mapping[str, str]) -> Recipe:
        """The base with a rule for each layer whose format is not the most common one."""
        network, rules = self.prices.network, self.base.rules
        common = Counter(words.values()).most_common(1)[0][0] if len(rules) == 1 else ""
        if common and rules[0].weights is not None:
            rules = (replace(rules[0], weights=replace(rules[0].weights, format=parse_format(common))),)
        changed = {layer: word for layer, word in words.items() if word != common}
        own = (
            Rule(literal(x), replace(asked_of(network, x), format=parse_format(word))) for x, word in changed.items()
        )
        return replace(self.base, rules=(*rules, *own))

    def _learn(self, words: Mapping[str, str], tried: RealNetwork) -> None:
        """Each format's errors grow by measured / predicted, to the power of its share of the predicted error."""
        errors: dict[str, float] = {}
        for layer, word in words.items():
            errors[word] = errors.get(word, 0.0) + self._error(layer, word)
        predicted = sum(errors.values()) + sum(self.prices.activations.values())
        for word, error in errors.items():
            self.trust[word] = self.trust.get(word, 1.0) * (tried.error / predicted) ** (error / predicted)
        self.extra = tried.taken - sum(self._stored(layer, word) for layer, word in words.items())

    def _named(self, chosen: Mapping[str, int]) -> dict[str, str]:
        """Layer → format."""
        return {layer: self._words(layer)[index] for layer, index in chosen.items()}

    def _alike(self, bits: float, limit: float) -> dict[str, str]:
        """Layer → format: of those with at most so many bits and bytes the one of least predicted error, for all."""
        several = {
            word: {layer: word if word in self._words(layer) else self._words(layer)[0] for layer in self.layers}
            for word in self.words
            if _code_bits(word) <= bits
        }

        def loss(word: str) -> tuple[bool, float]:
            return self.files[word] > limit, sum(self._error(*pair) for pair in several[word].items())

        return several[min(several, key=loss)]


def _code_bits(word: str) -> int:
    return parse_format(word).grid.bits


def _file_bytes(network: Network, recipe: Recipe) -> int:
    """Of the file that the network becomes, with its recipe and its ledger."""
    program = compact(export(network), network.program)
    return len(serialize(program)) + len(recipe.to_toml()) + len(to_text(ledger(network)))
