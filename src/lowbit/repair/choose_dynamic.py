"""Which layers measure the range of what they read at each input, where a static range costs the outputs more.

Two networks are made: this one, and one in which every layer measures that has a kernel for it. For both, backward
passes estimate what the rounding of each value adds to the error of the outputs (`repair.sensitivity`), and onnxruntime
profiles both files. A value takes its share of the additional time by its elements. Values become dynamic in the order
of the error that they save in this time, as many as make the least of

    ln E + 8 ln 4 · T / T_static        E: squared error of the outputs, T: time of the file

The rate of exchange is that of bits: one more than 8 in all values divides E by 4 and takes an eighth more time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import takewhile
from math import log

from lowbit.graph.layer import layers_of
from lowbit.network.network import Network
from lowbit.network.stored import WeightQuant
from lowbit.network.weights import has_one_scale_an_output
from lowbit.numerics.grids import is_whole
from lowbit.recipe import DYNAMIC, Recipe, Rule
from lowbit.repair.prove import Calibration, LeftOut, fit
from lowbit.repair.sensitivity import output_errors, quantizer_costs
from lowbit.repair.wider import literal
from lowbit.targets import Role

RATE = 8 * log(4)  # of ln E against the share of the time
LEAST_GAIN = 0.2  # of a value's own error: estimates from 64 samples spread by 18 %
Layers = frozenset[str]  # that read one value


def choose_dynamic(network: Network, calibration: Calibration) -> list[str]:
    """Make the network again, from the float one, with the layers that measure; rows are normalized for them."""
    recipe, again, seconds = network.placement.recipe, calibration.again, calibration.seconds
    assert again is not None
    assert seconds is not None
    if any(name.startswith("equalize") for name in takewhile("choose_dynamic".__ne__, recipe.passes)):
        raise LeftOut("choose_dynamic makes the network again from the float one: it must stand before 'equalize'")
    values = _readers(network, dynamic=False)
    if not values:
        raise LeftOut("no layer can measure its range at each input: none multiplies int8 weights with a float value")
    calibration.stage("pricing ranges of each input")
    samples = calibration.single or calibration.judging
    every = again(measuring(recipe, values))
    fit(every, replace(calibration, exact=[], earlier=[]))
    measured = _readers(every, dynamic=True)
    errors = output_errors(every, dict.fromkeys(measured.values(), ()), samples)
    costs = quantizer_costs(network, samples)
    saved = {}
    for layers, name in values.items():
        error = errors.get(measured.get(layers, ""))
        if name in costs and error is not None and (gain := costs[name] - float(error[0])) > LEAST_GAIN * costs[name]:
            saved[layers] = gain
    largest = max(samples, key=lambda batch: sum(array.nbytes for array in batch.values()))
    more = max(0.0, seconds(every, largest) / seconds(network, largest) - 1)
    counts = {layers: network.activations()[name].statistics.count for layers, name in values.items()}
    shares = {layers: more * counts[layers] / sum(counts.values()) for layers in saved}
    chosen = _worth(saved, shares, sum(costs.values()))
    if not chosen:
        raise LeftOut("no layer measures its range at each input: static ranges lose too little for the time it takes")
    renewed = again(measuring(recipe, [layers for layers in values if layers in chosen]))
    vars(network).update(vars(renewed))
    network.keep_before_steps()
    names = [str(node.name) for node in network.program.graph if any(node.name in layers for layers in chosen)]
    told = f"{len(names)} layer{'s' * (len(names) != 1)} measured at each input: {', '.join(names)}"
    return [told, *fit(network, calibration)]


def _worth(saved: Mapping[Layers, float], shares: Mapping[Layers, float], error: float) -> list[Layers]:
    """Those that make the sum of ln E and the time least, the best first; error: E while all are static."""
    order = sorted(saved, key=lambda layers: shares[layers] / saved[layers])
    best, count, time = log(error) if saved else 0.0, 0, 0.0
    for number, layers in enumerate(order, 1):
        error, time = error - saved[layers], time + shares[layers]
        if (loss := log(max(error, 1e-30)) + RATE * time) < best:
            best, count = loss, number
    return order[:count]


def _readers(network: Network, dynamic: bool) -> dict[Layers, str]:
    """Layers that read one value, all of which have kernels for either range → the value, static or dynamic.

    The value is made in float, for them: what an integer kernel makes, or shares its scale, has a static range.
    """
    target, groups, found = network.placement.target, network.placement.groups(), {}
    able = {
        str(node.name)
        for node in network.program.graph
        if target.kernels.get(node.op_type) is Role.MULTIPLY and node.op_type in target.dynamic
        for layer in layers_of(node)
        if isinstance(weights := network.quantizers.get(str(layer.value.name)), WeightQuant)
        and is_whole(weights.format.grid)
        and weights.format.grid.bits <= 8
        and has_one_scale_an_output(weights.format.block, layer.weight.shape, layer.output_axis)
    }
    for group, (site, *others) in groups.items():
        layers = frozenset(name for name, _ in site.readers or ())
        if layers and layers <= able and not others and site.spec.dynamic is dynamic:
            found[layers] = group
    return found


def measuring(recipe: Recipe, several: Iterable[Layers]) -> Recipe:
    """The recipe with a rule for each of these layers, and without this step: the rules say what was chosen."""
    rules = [Rule(literal(name), None, DYNAMIC) for layers in several for name in sorted(layers)]
    passes = tuple(name for name in recipe.passes if name != "choose_dynamic")
    return replace(recipe, rules=(*recipe.rules, *rules), passes=passes)
