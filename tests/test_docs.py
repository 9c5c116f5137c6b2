"""The pages say what is so: the tutorial runs as it stands, recipes parse, links lead somewhere."""

import re
from pathlib import Path

import pytest

import lowbit as lb

ROOT = Path(__file__).parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_tutorial_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks(ROOT / "docs" / "tutorial.md", "python")), {})
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "net.int8.onnx").read_bytes()


@pytest.mark.slow
def test_the_page_on_simulation_runs():
    found: dict[str, object] = {}
    exec("\n".join(blocks(ROOT / "docs" / "simulation.md", "python")), found)
    assert 0 < float(((found["quantized"] - found["exact"]) ** 2).sum() / (found["exact"] ** 2).sum()) < 0.1


def test_recipes_on_the_pages_are_recipes():
    texts = blocks(ROOT / "docs" / "recipes.md", "toml")
    assert texts
    for text in texts:
        assert lb.Recipe.from_toml(lb.Recipe.from_toml(text).to_toml()) == lb.Recipe.from_toml(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md"]
    assert [name for name in pages if name in index] == pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_pages_are_commands(page):
    """Every `lowbit NAME` in a block of shell is a command that the help lists."""
    from lowbit.cli.app import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    used = {word for text in blocks(page, "sh") for word in re.findall(r"^lowbit (\w+)", text, re.MULTILINE)}
    assert used <= known
