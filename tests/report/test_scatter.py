"""A scatter plot whose names can be read."""

from itertools import combinations
from xml.etree import ElementTree

from lowbit.report.scatter import _labels, _meet, scatter_svg


def test_no_name_covers_another_or_a_point():
    places = [(300.0 + 3 * (i % 4), 300.0 + 2.5 * i, f"int{i} channel:0") for i in range(24)]
    boxes = _labels(places)
    assert not any(_meet(one, other) for one, other in combinations(boxes, 2))
    assert not any(left < x < right and top < y < bottom for left, top, right, bottom in boxes for x, y, _ in places)


def test_a_name_stands_beside_a_lonely_point():
    ((left, top, _, bottom),) = _labels([(100.0, 200.0, "nf4")])
    assert left == 106
    assert (top + bottom) / 2 == 200


def test_the_picture_is_svg_with_every_name_and_both_axes():
    text = scatter_svg([(4.0, 20.0, "a<b"), (8.0, 40.0, "c")], "title", "bits", "dB", (6.02, "6 dB a bit"))
    texts = [t.text for t in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert {"a<b", "c", "title", "bits", "dB", "6 dB a bit", "0", "8"} <= set(texts)
