"""The rules of the house: sizes, directions of imports, one mechanism for each thing, the field's terms."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from conftest import SLOW_FILES, SLOW_NAMES

import helpers

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "helpers"
WINGS = ("pipeline", "scale")
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

# Where a digest is no name of a run, each with the reason.
DIGESTS = {
    "cache.py": "the run key",
    "data.py": "the signature of the scored pixels, which committed results carry",
    "sam/embeddings.py": "an image is known by its pixels, whatever its file is called",
    "sam/networks.py": "the released checkpoint is held to its published checksum",
}
# CONTRIBUTING.md has the words to use instead.
DIALECT = re.compile(
    r"\bhang(s|ing)?\s+on\b|phantom|judg|finder|doubt|trick|(?<![a-z])deal(s|t|ing)?(?![a-z])|\bhad,\s+else\b",
    re.IGNORECASE,
)


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def module_name(file):
    parts = ["helpers", *Path(file).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imports(file):
    """Modules of ours that a file imports, anywhere in it."""
    here = module_name(file).split(".")
    package = here if file.endswith("__init__.py") else here[:-1]
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            known = name if name in MODULES else name.rpartition(".")[0]
            if known in MODULES and known != "helpers":
                yield known


GRAPH = {module_name(file): set(imports(file)) for file in FILES}


def wing(module):
    """The wing of a module's dotted name, or "core"."""
    second = (module.split(".") + [""])[1]
    return second if second in WINGS else "core"


def test_the_graph_of_imports_sees_something():
    assert "helpers.cache" in GRAPH["helpers.results"]
    assert any(wing(module) == "pipeline" for module in GRAPH)
    assert sum(len(targets) for targets in GRAPH.values()) > 40


def test_the_core_and_the_whole_are_small():
    size = Counter()
    for file, path in FILES.items():
        size[wing(module_name(file))] += lines(path)
    assert size["core"] <= 5200, size
    assert sum(size.values()) <= 8750, size


def test_no_file_is_long():
    long = {file: lines(path) for file, path in FILES.items() if lines(path) > 600}
    assert not long, long


def test_imports_go_round_in_no_circle():
    """A module goes when it imports none that is left, or none that is left imports it; a circle stays."""
    left = dict(GRAPH)
    while left:
        left = {module: targets & left.keys() for module, targets in left.items()}
        imported = set().union(*left.values())
        circling = {m: targets for m, targets in left.items() if targets and m in imported}
        assert len(circling) < len(left), "\n".join(f"{m} -> {sorted(left[m])}" for m in left)
        left = circling


@pytest.mark.parametrize(
    ("importer", "never"), [("core", "pipeline"), ("core", "scale"), ("pipeline", "scale")]
)
def test_imports_point_one_way(importer, never):
    against = {
        (module, target)
        for module, targets in GRAPH.items()
        for target in targets
        if wing(module) == importer and wing(target) == never
    }
    assert against == set()


def test_importing_helpers_loads_no_framework():
    code = "import helpers, sys; print({'torch', 'tensorflow', 'keras'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr


def attributes(name):
    """Each use of an attribute, as (file, what it is taken from)."""
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == name:
                yield file, ast.unparse(node.value)


def test_one_training_loop():
    assert len(list(attributes("backward"))) <= 1, list(attributes("backward"))


def test_one_run_key():
    uses = {file for file, path in FILES.items() if "hashlib" in path.read_text(encoding="utf-8")}
    assert "cache.py" in uses
    assert sorted(uses - DIGESTS.keys()) == []


def test_one_atomic_write():
    uses = {file for file, origin in attributes("replace") if origin == "os"}
    assert uses == {"cache.py"}


@pytest.mark.parametrize("folder", ["helpers", "notebooks", "README.md"])
def test_terms_are_the_fields_own(folder):
    paths = [path for end in ("py", "md", "json", "ipynb") for path in (ROOT / folder).rglob(f"*.{end}")]
    found = []
    for path in paths or [ROOT / folder]:
        text = path.read_text(encoding="utf-8")
        for match in DIALECT.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(ROOT)}:{line}: {match[0]}")
    assert not found, "\n".join(found)


def test_the_map_shows_every_module_and_nothing_else():
    listed = re.findall(r"`(\w+)`", helpers.__doc__)
    inside = {part for module in MODULES for part in module.split(".")[1:]}
    in_sam = {module.split(".")[2] for module in MODULES if module.startswith("helpers.sam.")}
    assert set(listed) - {"helpers"} == inside - in_sam - {"__main__"}


def test_what_is_slow_exists():
    tests = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py")}
    assert tests.keys() >= set(SLOW_FILES)
    names = re.findall(r"^def (test_\w+)", "\n".join(tests.values()), flags=re.MULTILINE)
    unused = [word for word in SLOW_NAMES.pattern.split("|") if not any(word in n for n in names)]
    assert unused == []


def test_versions_agree():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert f"ruff-pre-commit\n    rev: v{pinned['ruff']}\n" in hooks
    assert f"nbstripout\n    rev: {pinned['nbstripout']}\n" in hooks
