"""The integer program: against every choice there is, and what limits and values between layers do to it."""

from itertools import product

import numpy as np

from lowbit.solve.program import Between, Option, Program


def three_layers(seed: int) -> Program:
    """Layers of 2, 3 and 4 bits with random errors, each also in float; two values between them."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(10, 100, 3)
    options = {
        f"layer{i}": [
            *(
                Option({"error": float(rng.uniform(1, 2) * 4.0**-bits), "bytes": float(bits * size)})
                for bits in (2, 3, 4)
            ),
            Option({"bytes": 32.0 * size}, in_float=True),
        ]
        for i, size in enumerate(sizes)
    }
    return Program(options, [Between({"error": 0.05}, [f"layer{i}", f"layer{i + 1}"]) for i in range(2)])


def test_no_choice_is_better_than_the_one_found():
    for seed in range(20):
        program = three_layers(seed)
        names = list(program.options)
        limit = program.total(dict.fromkeys(names, 2))["bytes"] * 1.9
        every = [dict(zip(names, x, strict=True)) for x in product(range(4), repeat=3)]
        kept = [program.total(choice) for choice in every if program.total(choice)["bytes"] <= limit]
        found = program.least("error", {"bytes": limit})
        assert found is not None
        assert program.total(found)["bytes"] <= limit * (1 + 1e-6)
        assert program.total(found).get("error", 0) <= min(t.get("error", 0) for t in kept) * 1.001 + 1e-9


def test_a_limit_below_the_least_amount_has_no_choice():
    program = three_layers(0)
    least = program.least("bytes")
    assert least == dict.fromkeys(program.options, 0)
    assert program.least("error", {"bytes": program.total(least)["bytes"] - 1}) is None


def test_a_value_counts_while_a_layer_beside_it_is_in_integers():
    options = {name: [Option({}), Option({"loss": 1.0}, in_float=True)] for name in "abc"}
    program = Program(
        options, [Between({"error": 4.0}, "ab"), Between({"error": 1.0}, "bc"), Between({"error": 0.5}, "")]
    )
    assert program.least("loss", {"error": 1.5}) == {"a": 1, "b": 1, "c": 0}
    assert program.total({"a": 1, "b": 1, "c": 0}) == {"loss": 2.0, "error": 1.5}
    assert program.least("loss", {"error": 0.5}) == {"a": 1, "b": 1, "c": 1}
    assert program.least("loss", {"error": 0.4}) is None  # the value with no layer beside it cannot be had in float
