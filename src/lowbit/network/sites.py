"""Where quantizers are: a site is a quantizer on one ONNX value, a placement all sites of a program."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lowbit.recipe import Recipe, TensorSpec
from lowbit.targets import Target, find_target

_NO_RULES = Recipe((), target="generic")


@dataclass(frozen=True)
class Site:
    """A quantizer on one value.

    group     sites with the same group have the same scale
    readers   (node, input index) that read the quantized value; None: all do, because the float value never exists
    product   for a bias: the activation and the weight whose scales it multiplies
    """

    value: str
    role: Literal["activation", "weight", "bias", "constant"]
    spec: TensorSpec
    layer: str
    group: str
    readers: frozenset[tuple[str, int]] | None = None
    product: tuple[str, str] | None = None


@dataclass(frozen=True)
class Placement:
    """Where quantizers are, and which nodes compute in integers.

    sites           by value name, in graph order
    float_reasons   value or node name → why it stays float
    integer         names of the nodes that multiply, add or look up integers; all others compute in float or only move
    idle_rules      what to tell of rules that change nothing
    recipe          by which it was placed; without one, for any engine
    states          recurrent layer whose states have fixed scales → state (h, and an LSTM's c) → what it is rounded to
    """

    sites: Mapping[str, Site]
    float_reasons: Mapping[str, str]
    integer: frozenset[str] = frozenset()
    idle_rules: tuple[str, ...] = ()
    recipe: Recipe = _NO_RULES
    states: Mapping[str, Mapping[str, TensorSpec]] = field(default_factory=dict)

    @property
    def target(self) -> Target:
        """What the file is for."""
        return find_target(self.recipe.target)

    def groups(self) -> dict[str, list[Site]]:
        """Activation sites by the scale that they share."""
        found: dict[str, list[Site]] = defaultdict(list)
        for site in self.sites.values():
            if site.role == "activation":
                found[site.group].append(site)
        return dict(found)
