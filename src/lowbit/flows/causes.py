"""Why a tensor's rounding costs what it costs: each cause is read from one measurement, and comes with a remedy.

`CAUSES` is the table: a function takes what was measured of a tensor and gives what it found, or None. Thresholds are
where the measured effect exceeds a bit: a range 4 times as wide as 99.9 % of its values takes two bits from them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape

import tomli_w

from lowbit.flows.tensor_facts import TensorFacts
from lowbit.network.sites import Placement
from lowbit.numerics import Int, channel
from lowbit.ranges import Auto
from lowbit.recipe import FLOAT, Recipe, Rule, TensorSpec

OUTLIER = 4.0  # largest value over the 99.9th percentile
SPREAD_WEIGHTS, SPREAD_ACTIVATIONS = 4.0, 8.0  # largest channel over the median one
MASK = 1e4  # a number that only "never" needs: −10,000 in the masks of BERT's exporters
FEW_CODES, NEGATIVE = 16, 0.2  # codes that more than a fifth of the values share
CLIPPING = 0.5  # share of a tensor's noise that clipping makes
COARSE_DB = 25.0  # of a weight; int8 per channel gives 35 to 45, int4 15 to 22
GROWS = 0.1  # of a range's width, from half of the samples to all
MANY = 0.25  # of the activations
COSTLY = 0.02  # share of the outputs' error below which a cause is not told
LARGE = 0.2  # share above which a tensor without a cause is


@dataclass(frozen=True)
class Finding:
    """A cause of error, with the measurement in words and what to do.

    cause    a name of CAUSES, "too few samples" or "preprocessing"
    tensor   its name, of an input too; empty: the whole network
    share    of the outputs' squared error that these tensors add, each alone and to first order; None: not an error
    recipe   lines of TOML that do what `remedy` says, to put at the end of the recipe; empty: a recipe cannot
    """

    cause: str
    tensor: str
    told: str
    remedy: str
    recipe: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Context:
    """What remedies follow from.

    around      activation → the layers that must stay in float for it to stay in float
    smoothable  activations whose outlier channels the pass `smooth` can move into weights
    """

    recipe: Recipe
    placement: Placement
    words: Mapping[str, str]
    around: Callable[[str], Sequence[str]]
    smoothable: frozenset[str]

    def spec(self, tensor: str) -> TensorSpec:
        """What the recipe asked for, before `auto` was decided."""
        return self.placement.sites[tensor].spec

    def in_float(self, facts: TensorFacts) -> tuple[str, str]:
        """(remedy, recipe): leave it in float."""
        layers = [facts.layer] if facts.role == "weight" else self.around(facts.name)
        names = [self.words.get(layer, layer) for layer in layers]
        listed = ", ".join(f"'{name}'" for name in names)
        return f"Leave {listed} in float.", rules_text(*(Rule(escape(n), FLOAT, FLOAT) for n in names))

    def rule(self, facts: TensorFacts, weights: TensorSpec | None = None, activations: TensorSpec | None = None) -> str:
        """A rule for the layer of a tensor."""
        return rules_text(Rule(escape(self.words.get(facts.layer, facts.layer)), weights, activations))


def rules_text(*rules: Rule) -> str:
    """Rules to put at the end of a recipe."""
    return "\n".join(rule.to_toml() for rule in rules)


def passes_text(recipe: Recipe, name: str) -> str:
    """TOML of the recipe's passes with one more, before the steps that correct."""
    return tomli_w.dumps({"passes": [*(p for p in recipe.passes if p not in _STEPS), name,
                                     *(p for p in recipe.passes if p in _STEPS)]})  # fmt: skip


_STEPS = ("correct_bias", "leave_in_float")
Cause = Callable[[TensorFacts, Context], Finding | None]


def mask_constant(x: TensorFacts, context: Context) -> Finding | None:
    """A number that means "never" stretches the range, and all others share its first codes."""
    largest = max(-x.minimum, x.maximum)
    if x.role == "weight" or largest < MASK or largest < MASK / 10 * x.median or (x.low or 0) > -MASK:
        return None
    told = f"its values reach {x.minimum:.4g}, a mask; half of them are below {x.median:.3g}, one step is {x.step:.3g}"
    return Finding("mask constant", x.name, told, *context.in_float(x))


def range_outlier(x: TensorFacts, context: Context) -> Finding | None:
    """Few values lie far outside: a range that holds them is coarse for all others, one that does not clips them."""
    if x.role == "weight" or x.low is None or x.high is None or x.tail < OUTLIER:
        return None
    reach = max(-x.low, x.high)
    largest = max(-x.minimum, x.maximum)
    head = f"its largest value, {largest:.3g}, is {x.tail:.1f} times the 99.9th percentile, {x.p999:.3g}"
    if reach >= x.p999 * OUTLIER:
        codes = min(2 * x.p999 if x.minimum < 0 else x.p999, x.high - x.low) / max(x.step, 1e-30)
        told = f"{head}: 99.9 % of the values share {codes:.0f} of {2 ** round(x.bits)} codes"
    elif (x.clipping_noise or 0) >= CLIPPING:
        told = (f"{head}; the range ends at {reach:.3g}, so {percent(x.clipped)} of the values are clipped, "
                f"and make {percent(x.clipping_noise)} of its noise")  # fmt: skip
    else:
        return None
    spec = context.spec(x.name)
    if isinstance(spec.range, Auto):
        return Finding("range outlier", x.name, told, *context.in_float(x))
    words = "Let the range be chosen by the error that reaches the outputs."
    return Finding("range outlier", x.name, told, words, context.rule(x, None, replace_range(spec, "auto")))


def channel_spread(x: TensorFacts, context: Context) -> Finding | None:
    """One scale for channels of unequal size: the small ones get few codes (Nagel et al. 2019, figure 2)."""
    spread = x.channel_spread or 0.0
    limit = SPREAD_WEIGHTS if x.role == "weight" else SPREAD_ACTIVATIONS
    if not x.one_scale or spread < limit or x.channels < 4:
        return None
    told = f"its largest channel is {spread:.1f} times the median one, and all {x.channels} share one scale"
    spec = context.spec(x.name)
    if x.role == "weight" and spec.format is not None:
        better = TensorSpec(spec.format.with_block(channel(0)), spec.range, spec.solve)
        remedy = (
            "Give each output channel a scale of its own; where the engine cannot, add the pass 'equalize_weights'."
        )
        return Finding("channel spread", x.name, told, remedy, context.rule(x, better))
    if x.name in context.smoothable and "smooth" not in context.recipe.passes:
        remedy = "Move the large channels into the weights behind: the pass 'smooth'."
        return Finding("channel spread", x.name, told, remedy, passes_text(context.recipe, "smooth"))
    return Finding("channel spread", x.name, told, *context.in_float(x))


def few_bits(x: TensorFacts, context: Context) -> Finding | None:
    """The format of a weight is too coarse for how it was rounded."""
    spec = context.spec(x.name)
    if x.role != "weight" or spec.format is None or x.sqnr_db >= COARSE_DB or x.bits >= 8:
        return None
    told = f"{x.bits:.3g} bits, rounded by '{x.solver}', leave its values {x.sqnr_db:.1f} dB"
    if x.solver == "nearest":
        remedy, better = "Round it with the errors of the inputs in mind.", replace(spec, solve="gptq")
    else:
        remedy = "Give it 8 bits."
        better = TensorSpec(replace(spec.format, grid=Int(8)), "minmax")
    return Finding("few bits", x.name, told, remedy, context.rule(x, better))


def asymmetric_tail(x: TensorFacts, context: Context) -> Finding | None:
    """SiLU, GELU and HardSwish: many values in a small negative part, which one scale for both sides leaves coarse."""
    below, codes = x.below_zero or 0.0, x.codes_below_zero
    if x.role != "activation" or codes is None or not 0 < codes <= FEW_CODES or below < NEGATIVE:
        return None
    if -x.minimum > x.maximum / 10:
        return None
    ends = f"from {x.minimum:.3g} to 0, beside {x.maximum:.3g} as the largest"
    told = f"{percent(below)} of its values are {ends}, and share {codes} codes"
    spec = context.spec(x.name)
    if isinstance(spec.range, Auto):
        return Finding("asymmetric tail", x.name, told, *context.in_float(x))
    words = "Clip the largest values: let the range be chosen by the error that reaches the outputs."
    return Finding("asymmetric tail", x.name, told, words, context.rule(x, None, replace_range(spec, "auto")))


def constant_tensor(x: TensorFacts, context: Context) -> Finding | None:
    """One value throughout: a weight that never trained, or an activation that the calibration data never moved."""
    if x.minimum != x.maximum:
        return None
    told = f"it is {x.minimum:.4g} throughout" + ("" if x.role == "weight" else " the calibration data")
    remedy = "Look whether it was trained." if x.role == "weight" else "Give calibration data that moves it."
    return Finding("constant tensor", x.name, told, remedy, context.in_float(x)[1])


CAUSES: Mapping[str, Cause] = {
    "constant tensor": constant_tensor,
    "mask constant": mask_constant,
    "few bits": few_bits,
    "range outlier": range_outlier,
    "channel spread": channel_spread,
    "asymmetric tail": asymmetric_tail,
}


def explain(facts: Sequence[TensorFacts], context: Context) -> list[Finding]:
    """What was found of the tensors that cost at least COSTLY, the most costly first; of constants in any case."""
    total = sum(x.cost or 0.0 for x in facts) or 1.0
    found: list[Finding] = []
    for x in sorted(facts, key=lambda x: -(x.cost or 0.0)):
        share = (x.cost or 0.0) / total
        told = [f for cause in CAUSES.values() if (f := cause(x, context)) is not None]
        told = told if share >= COSTLY else [f for f in told if f.cause == "constant tensor"]
        if not told and share >= LARGE:
            words = f"no single fault: rounded at {x.sqnr_db:.1f} dB, and the outputs depend on it much"
            told = [Finding("sensitive", x.name, words, *context.in_float(x))]
        found += [replace(f, share=share) for f in told]
    return found


def too_few_samples(facts: Sequence[TensorFacts], samples: int) -> list[Finding]:
    """Ranges that still move when the samples are doubled were not seen whole."""
    known = [x for x in facts if x.growth is not None]
    moving = [x for x in known if (x.growth or 0.0) > GROWS]
    if not known or len(moving) < MANY * len(known):
        return []
    total = sum(x.cost or 0.0 for x in facts) or 1.0
    worst = max(moving, key=lambda x: x.growth or 0.0)
    told = (f"{len(moving)} of {len(known)} ranges moved by more than {percent(GROWS)} of their width from half of the "
            f"{samples} samples to all, '{worst.name}' by {percent(worst.growth)}")  # fmt: skip
    remedy = f"Give more samples: {max(200, 4 * samples)} or so."
    return [Finding("too few samples", "", told, remedy, share=sum(x.cost or 0.0 for x in moving) / total)]


def dead_channels(facts: Sequence[TensorFacts]) -> list[Finding]:
    """Channels that are always 0 cost time and bytes, but no accuracy."""
    dead = [x for x in facts if x.dead_channels and x.dead_channels < x.channels]
    if not dead:
        return []
    worst = max(dead, key=lambda x: x.dead_channels / x.channels)
    told = (f"{sum(x.dead_channels for x in dead)} channels of {len(dead)} tensors are always 0, "
            f"{worst.dead_channels} of {worst.channels} in '{worst.name}'")  # fmt: skip
    return [Finding("dead channels", "", told, "They add no error. Prune them from the network to save their time.")]


def percent(share: float | None) -> str:
    """A share of 1 as one reads it."""
    value = 100 * (share or 0.0)
    return f"{value:.0f} %" if value >= 9.5 else f"{value:.2g} %"


def replace_range(spec: TensorSpec, words: str) -> TensorSpec:
    """The same format under another range."""
    return TensorSpec(spec.format, words)
