"""Every grid is its table of values."""

from lowbit.numerics import Float, Int


def test_e2m1_has_these_fifteen_values():
    assert Float(2, 1).values().tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_narrow_leaves_out_the_lowest_integer():
    assert (Int(4).minimum, Int(4, narrow=True).minimum, Int(4).maximum) == (-8, -7, 7)
