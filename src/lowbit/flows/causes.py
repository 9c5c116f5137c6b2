"""Why a tensor's rounding costs what it costs: each cause is read from one measurement, and comes with a remedy.

`CAUSES` is the table, the most specific first: a function takes what was measured of a tensor and says what it found,
or None. Thresholds are where the effect exceeds a bit or two: a range 4 times as wide as 99.9 % of its values takes two
bits from them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import tomli_w

from lowbit.flows.tensor_facts import TensorFacts
from lowbit.network.sites import Placement
from lowbit.numerics import INT8, Int, channel
from lowbit.ranges import Auto
from lowbit.recipe import FLOAT, Recipe, Rule, TensorSpec
from lowbit.repair.wider import literal
from lowbit.report.words import share_text

OUTLIER = 4.0  # largest value over the 99.9th percentile
SPREAD_WEIGHTS, SPREAD_ACTIVATIONS = 2.0, 8.0  # largest channel over the median one: a bit, three bits
MASK = 1e4  # a number that only "never" needs: −10,000 in the masks of BERT's exporters
FEW_CODES, NEGATIVE = 16, 0.2  # codes that more than a fifth of the values share
CLIPPING = 0.5  # share of a tensor's noise that clipping makes
COARSE_DB = 30.0  # of a weight; int8 per channel gives 35 to 48, int4 12 to 27 (MobileNet v1 0.25)
GROWS, MANY = 0.1, 0.25  # of a range's width, from half of the samples to all; of the activations
FEWEST = 8  # samples
COSTLY = 0.05  # share of the outputs' error below which a cause is not told, and a tensor is not left in float
LARGE = 0.2  # share above which a tensor without a cause is told


@dataclass(frozen=True)
class Remedy:
    """What to do, in words.

    recipe      lines of TOML that do it, to put behind a recipe; empty: no recipe can
    outputs_db  SQNR of the outputs, simulated, with these lines; None where it was not tried
    """

    told: str
    recipe: str = ""
    outputs_db: float | None = None


@dataclass(frozen=True)
class Finding:
    """A cause of error, with the measurement in words and what to do.

    cause    a name of CAUSES, "sensitive", "too few samples", "preprocessing" or "dead channels"
    tensors  those that it was found in, the costliest first; an input; none: the whole network
    told     what was measured of the first
    share    of the outputs' squared error that these tensors add, each alone and to first order; None: not known
    """

    cause: str
    tensors: tuple[str, ...]
    told: str
    remedies: tuple[Remedy, ...]
    share: float | None = None


@dataclass(frozen=True)
class Context:
    """What remedies follow from.

    specs       layer → what the recipe asks for its weights and activations
    words       layer → what a rule calls it
    around      activation → the layers that must stay in float for it to stay in float
    smoothable  activations whose outlier channels the pass `smooth` can move into weights
    """

    recipe: Recipe
    placement: Placement
    specs: Mapping[str, tuple[TensorSpec, TensorSpec]]
    words: Mapping[str, str]
    around: Callable[[str], Sequence[str]]
    smoothable: frozenset[str]

    def spec(self, x: TensorFacts) -> TensorSpec:
        """What the recipe asked for, before `auto` was decided."""
        return self.specs[x.layer][0] if x.role == "weight" else self.placement.sites[x.name].spec


# What to do about a tensor, in words, and what does it: another spec, a pass, FLOAT, or None where no recipe can.
Change = tuple[str, TensorSpec | str | None]
Told = tuple[str, tuple[Change, ...]]  # what was measured; the remedies, the mildest first
Cause = Callable[[TensorFacts, Context], Told | None]
IN_FLOAT: Change = ("Leave in float what costs most, and so the layers around it.", FLOAT)


def mask_constant(x: TensorFacts, context: Context) -> Told | None:
    """A number that means "never" stretches the range, and all others share its first codes."""
    if x.role == "weight" or max(-x.minimum, x.maximum) < max(MASK, MASK / 10 * x.median) or (x.low or 0) > -MASK:
        return None
    told = f"its values reach {x.minimum:.4g}, a mask; half of them are below {x.median:.3g}, a step is {x.step:.3g}"
    return told, (IN_FLOAT,)


def few_bits(x: TensorFacts, context: Context) -> Told | None:
    """The format of a weight is too coarse for how it was rounded."""
    spec = context.spec(x)
    if x.role != "weight" or spec.format is None or x.sqnr_db >= COARSE_DB or x.bits >= 8:
        return None
    told = f"{x.bits} bits, rounded by '{x.solver}', leave its values {x.sqnr_db:.1f} dB"
    better = {"nearest": "gptq", "gptq": "adaround"}.get(spec.solve)
    rounded = (f"Round by '{better}'.", replace(spec, solve=better)) if better else None
    plain = isinstance(spec.format.grid, Int) and spec.format.scale is None
    eight = replace(spec.format, grid=Int(8)) if plain else INT8.with_block(channel(0))
    wider = ("Give them 8 bits.", TensorSpec(eight, "minmax"))
    return told, (rounded, wider) if rounded else (wider,)


def range_outlier(x: TensorFacts, context: Context) -> Told | None:
    """Few values lie far outside: a range that holds them is coarse for all others, one that does not clips them."""
    if x.role == "weight" or x.low is None or x.high is None:
        return None
    reach, largest = max(-x.low, x.high), max(-x.minimum, x.maximum)
    told = f"its largest value, {largest:.3g}, is {x.tail:.1f} times the 99.9th percentile, {x.p999:.3g}"
    if x.tail >= OUTLIER and reach >= x.p999 * OUTLIER:
        codes = (2 if x.minimum < 0 else 1) * x.p999 / max(x.step, 1e-30)
        told += f": 99.9 % of the values share {codes:.0f} of {2**x.bits} codes"
    elif x.tail >= OUTLIER / 2 and (x.clipping_noise or 0) >= CLIPPING:
        share = share_text(x.clipping_noise)
        ends = f"the range ends at {reach:.3g}"
        told += f"; {ends}, and clipping {share_text(x.clipped)} of the values makes {share} of its noise"
    else:
        return None
    return told, _range_by_error(x, context)


def channel_spread(x: TensorFacts, context: Context) -> Told | None:
    """One scale for channels of unequal size: the small ones get few codes (Nagel et al. 2019, figure 2)."""
    spread, spec = x.channel_spread or 0.0, context.spec(x)
    limit = SPREAD_WEIGHTS if x.role == "weight" else SPREAD_ACTIVATIONS
    if not x.one_scale or spread < limit or x.channels < 4:
        return None
    told = f"its largest channel is {spread:.1f} times the median one, and all {x.channels} share one scale"
    if x.role == "weight" and spec.format is not None:
        own = TensorSpec(spec.format.with_block(channel(0)), spec.range, spec.solve)
        equalized = ("Or equalize the channels.", "equalize_weights")
        return told, (("Give each output channel a scale of its own.", own), equalized)
    if x.name in context.smoothable and "smooth" not in context.recipe.passes:
        return told, (("Move the large channels into the weights behind.", "smooth"), IN_FLOAT)
    return told, (IN_FLOAT,)


def asymmetric_tail(x: TensorFacts, context: Context) -> Told | None:
    """SiLU, GELU and HardSwish: many values in a small negative part, which one scale for both sides leaves coarse."""
    below, codes = x.below_zero or 0.0, x.codes_below_zero
    if x.role != "activation" or not codes or codes > FEW_CODES or below < NEGATIVE or -x.minimum > x.maximum / 10:
        return None
    ends = f"from {x.minimum:.3g} to 0, beside {x.maximum:.3g} as the largest"
    return f"{share_text(below)} of its values are {ends}, and share {codes} codes", _range_by_error(x, context)


def constant_tensor(x: TensorFacts, context: Context) -> Told | None:
    """One value throughout: a weight that never trained, or an activation that the calibration data never moved."""
    if x.minimum != x.maximum:
        return None
    if x.role == "weight":
        return f"it is {x.minimum:.4g} throughout", (("Look whether it was trained.", None),)
    told = f"it is {x.minimum:.4g} throughout the calibration data"
    return told, (("Give calibration data that moves it.", None), IN_FLOAT)


def _range_by_error(x: TensorFacts, context: Context) -> tuple[Change, ...]:
    """Another range, unless ranges are chosen by the error already; or float."""
    spec = context.spec(x)
    chosen = ("Let the range be chosen by the error that reaches the outputs.", TensorSpec(spec.format, "auto"))
    return (IN_FLOAT,) if isinstance(spec.range, Auto) else (chosen, IN_FLOAT)


CAUSES: Mapping[str, Cause] = {
    "constant tensor": constant_tensor,
    "mask constant": mask_constant,
    "few bits": few_bits,
    "channel spread": channel_spread,
    "range outlier": range_outlier,
    "asymmetric tail": asymmetric_tail,
}


def explain(facts: Sequence[TensorFacts], context: Context) -> list[Finding]:
    """Causes of at least COSTLY of the error, the most costly first; constants and masks in any case."""
    total = sum(x.cost or 0.0 for x in facts) or 1.0
    found: dict[tuple[str, ...], list[tuple[TensorFacts, Told]]] = {}
    for x in sorted(facts, key=lambda x: -(x.cost or 0.0)):
        told = {name: told for name, cause in CAUSES.items() if (told := cause(x, context)) is not None}
        if not told and (x.cost or 0.0) >= LARGE * total:
            words = f"no single fault: rounded at {x.sqnr_db:.1f} dB, and the outputs depend on it much"
            told = {"sensitive": (words, (IN_FLOAT,))}
        for name, (_, changes) in list(told.items())[:1]:  # the others say more of the same tensor
            words = "; ".join(each for each, _ in told.values())
            found.setdefault((name, *(words for words, _ in changes)), []).append((x, (words, changes)))
    findings = [_finding(name, members, total, context) for (name, *_), members in found.items()]
    told_anyway = ("constant tensor", "mask constant")
    findings = [f for f in findings if (f.share or 0.0) >= COSTLY or f.cause in told_anyway]
    return sorted(findings, key=lambda f: -(f.share or 0.0))


def _finding(name: str, members: list[tuple[TensorFacts, Told]], total: float, context: Context) -> Finding:
    """One cause in several tensors.

    Another format serves all of them, not the costliest: costs of single tensors say little where a solver has the next
    layer make up for them. Of MobileNet 0.25 in w4a8-fast two weights make a third of the sum; 8 bits for both gain
    0.1 dB, for all 11 dB. In float only the costly ones are left, at least one.
    """
    told, changes = members[0][1]
    costly = [m for m in members if (m[0].cost or 0.0) >= COSTLY * total] or members[:1]
    remedies = []
    for index, (words, change) in enumerate(changes):
        served = costly if change == FLOAT else members
        lines = _lines([(x, each[index][1]) for x, (_, each) in served], context)
        remedies.append(Remedy(words, _passes(context.recipe, change) if isinstance(change, str) else lines))
    share = sum(x.cost or 0.0 for x, _ in members) / total
    return Finding(name, tuple(x.name for x, _ in members), told, tuple(remedies), share)


def _lines(changes: Sequence[tuple[TensorFacts, TensorSpec | str | None]], context: Context) -> str:
    """Rules that give each tensor its new spec."""
    rules: dict[str, Rule] = {}
    for x, better in changes:
        if better == FLOAT:
            layers = [x.layer] if x.role == "weight" else context.around(x.name)
            words = [literal(context.words.get(layer, layer)) for layer in layers]
            rules |= {word: Rule(word, FLOAT, FLOAT) for word in words}
        elif isinstance(better, TensorSpec):
            word, is_weight = literal(context.words.get(x.layer, x.layer)), x.role == "weight"
            rules[word] = Rule(word, better if is_weight else None, None if is_weight else better)
    return "\n".join(rule.to_toml() for rule in rules.values())


def _passes(recipe: Recipe, name: str) -> str:
    """The recipe's passes with one more, before the steps that correct."""
    steps = ("correct_bias", "leave_in_float")
    ordered = [*(p for p in recipe.passes if p not in steps), name, *(p for p in recipe.passes if p in steps)]
    return tomli_w.dumps({"passes": ordered})


def with_lines(recipe: Recipe, lines: str) -> Recipe:
    """The recipe with these lines behind it; passes take the place of its own."""
    more = Recipe.from_toml(lines)
    return replace(recipe, passes=more.passes or recipe.passes, rules=(*recipe.rules, *more.rules))


def too_few_samples(facts: Sequence[TensorFacts], samples: int) -> list[Finding]:
    """Ranges that still move when the samples are doubled were not seen whole."""
    known = [x for x in facts if x.growth is not None]
    moving = sorted((x for x in known if (x.growth or 0.0) > GROWS), key=lambda x: -(x.growth or 0.0))
    remedy = Remedy(f"Give more samples: {max(200, 4 * samples)} or so.")
    if samples < FEWEST:
        return [Finding("too few samples", (), f"there are {samples}", (remedy,))]
    if not known or len(moving) < MANY * len(known):
        return []
    total = sum(x.cost or 0.0 for x in facts) or 1.0
    told = (
        f"{len(moving)} of {len(known)} ranges moved by more than {share_text(GROWS)} of their width from half of the "
        f"{samples} samples to all, '{moving[0].name}' by {share_text(moving[0].growth)}"
    )
    share = sum(x.cost or 0.0 for x in moving) / total
    return [Finding("too few samples", tuple(x.name for x in moving), told, (remedy,), share)]


def dead_channels(facts: Sequence[TensorFacts]) -> list[Finding]:
    """Channels that are always 0 cost time and bytes, but no accuracy."""
    dead = sorted((x for x in facts if 0 < x.dead_channels < x.channels), key=lambda x: -x.dead_channels / x.channels)
    if not dead:
        return []
    told = (
        f"{dead[0].dead_channels} of {dead[0].channels} channels are always 0; "
        f"{sum(x.dead_channels for x in dead)} in all {len(dead)} tensors"
    )
    remedy = Remedy("They add no error. Prune them from the network to save their time.")
    return [Finding("dead channels", tuple(x.name for x in dead), told, (remedy,))]
