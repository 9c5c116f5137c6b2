"""The page of a diagnosis: whole without a network, safe with any name, and in a browser as wide as its window."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_networks import convolutions, images

from lowbit.flows.diagnose import diagnose
from lowbit.flows.diagnosis import Diagnosis
from lowbit.report.charts import Axis, columns, histogram, line

TRIES = [
    {"what": "int8", "metric": 0.913, "bytes": 287_460, "latency": 0.2, "seconds": 4.0},
    {"what": "int8, 'conv1' in float", "metric": 0.917, "bytes": 290_000, "latency": None, "seconds": 9.5},
]


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    shifts = ["noise:0.5", "blur:1"]
    return diagnose(convolutions(), images(48), "w4a8-fast", latency=False, shifts=shifts, tries=TRIES)


def test_the_page_asks_nothing_of_a_network(found):
    page = found.to_html()
    assert not re.search(r"https?://|<script|<link(?! rel=\"icon\" href=\"data:)|@import|url\(", page)
    assert len(page) < 200_000


def test_the_page_has_its_parts_in_this_order(found):
    heads = re.findall(r"<h2>(.*?)</h2>", found.to_html())
    assert heads == [
        *("What to do", "Error along the network", "The costliest tensors", "Channel spread of weights"),
        *("Off its distribution", "What it costs to run", "What stayed in float", "What was tried", "All layers"),
        "What was done",
    ]


def test_tries_are_shown_as_they_were_given(found):
    row = re.search(r"<td>int8, .*?</tr>", found.to_html())[0]
    assert re.findall(r">([^<]+)</td>", row) == ["int8, &#x27;conv1&#x27; in float", "0.917", "290,000\xa0B", "9.5"]


def test_names_cannot_become_markup(found):
    bad = "<script>alert(1)"
    page = replace(found, source=bad, steps=(bad,), tries=({"what": bad},)).to_html()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 3


def test_every_opened_tag_is_closed(found):
    from html.parser import HTMLParser

    class Balance(HTMLParser):
        void, open = {"meta", "link", "br"}, []

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in self.void:
                self.open.append(tag)

        def handle_startendtag(self, tag: str, attrs: Any) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    reader = Balance()
    reader.feed(found.to_html())
    assert not reader.open


def test_a_columns_height_is_its_part_of_the_chart():
    found = re.findall(
        r'y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"',
        columns([[(0.25, "weight", "a"), (0.5, "activation", "b")], []]),
    )
    assert found == [("150.00", "400.00", "50.00"), ("50.00", "400.00", "100.00")]  # of 1000 × 200


def test_a_line_puts_its_dots_where_its_values_are():
    assert 'points="0.0,200.00 1000.0,0.00"' in line([(0, 0, "low"), (1, 1, "high")], "total")


def test_what_a_range_clips_has_another_colour():
    kinds = re.findall(r'rect class="(\w+)"', histogram([1, 5, 9, 2], Axis(0, 4), (0, 3)))
    assert kinds == ["activation", "activation", "activation", "bad"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, Debian's or the one that playwright brings; without one the test is skipped, and says so."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium is installed here: apt install chromium")
    quiet = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    quiet += ["disable-component-update", "disable-sync"]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=[f"--{flag}" for flag in quiet])
        yield opened
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_a_browser_shows_it_without_complaint_and_without_scrolling_sideways(found, browser, tmp_path, width, scheme):
    long = "encoder.layers.0.a_very_long_name_that_no_phone_has_room_for.attention.output.dense.LayerNorm.weight"
    file = tmp_path / "page.html"
    tensors = tuple(replace(x, name=long + x.name) for x in found.tensors)
    layers = tuple(replace(r, name=long + r.name) for r in found.layers)
    for name, shown in (
        ("as it is", found),
        ("long names", replace(found, tensors=tensors, layers=layers, source=long)),
    ):
        file.write_text(shown.to_html(), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page, complaints = context.new_page(), []
        page.on("console", lambda message, c=complaints: c.append(message.text))
        page.on("pageerror", lambda error, c=complaints: c.append(str(error)))
        page.on("requestfailed", lambda request, c=complaints: c.append(request.url))
        page.goto(file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert complaints == [], name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().width > 100)")
        seen = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (seen == "rgb(20, 23, 26)") == (scheme == "dark")
        context.close()


WORDS = ("quiet", "good", "fair", "bad", "activation")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(found, scheme):
    """4.5 to 1 for text, 3 to 1 for the parts of charts (WCAG 2.2, 1.4.3 and 1.4.11)."""
    style = (Path(__file__).parents[2] / "src/lowbit/report/diagnosis.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", light if scheme == "light" else dark))

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for ground in ("page", "card"):
        for ink, least in {"text": 7, "weight": 3}.items() | dict.fromkeys(WORDS, 4.5).items():
            low, high = sorted((luminance(colours[ink]), luminance(colours[ground])))
            assert (high + 0.05) / (low + 0.05) >= least, (ink, ground)
