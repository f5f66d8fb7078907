"""What `pip install` brings: the package with its data, and the committed results."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Python of an environment that holds this package alone, without the libraries that it uses."""
    tmp_path = tmp_path_factory.mktemp("wheel")
    source = tmp_path / "source"  # a copy, for setuptools leaves its build beside what it builds
    source.mkdir()
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    for folder in ("helpers", "results"):
        left_out = shutil.ignore_patterns("__pycache__", "synthetic-*.json")
        shutil.copytree(ROOT / folder, source / folder, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, *build, str(source)], check=True, timeout=300)
    [wheel] = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False, symlinks=os.name != "nt")
    python = tmp_path / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=300)
    return python


def run(python, code, **environment):
    done = subprocess.run(
        [str(python), "-c", code],
        cwd=python.parent.parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_package_and_its_files_arrive(installed):
    code = (
        "import helpers, importlib.metadata, importlib.resources\n"
        "root = importlib.resources.files(helpers)\n"
        "print(root)\n"
        "print(importlib.metadata.version('breast-ultrasound-notebooks'))\n"
        "print(*(path.name for path in root.iterdir()))\n"
        "weights = root / 'pipeline' / 'weights'\n"
        "print(*(path.relative_to(weights).as_posix() for path in weights.rglob('*')))\n"
        "print(*(path.name for path in (root / 'pipeline' / 'exported').iterdir()))\n"
    )
    root, version, top, weights, exported = run(installed, code)
    assert Path(root).is_relative_to(installed.parent.parent)
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    ours = {path.name for path in (ROOT / "helpers").iterdir()} - {"__pycache__", "README.md"}
    assert {"py.typed", "busi_groups.csv", "sam", "pipeline", "scale"} <= ours
    assert set(top.split()) - {"__pycache__"} == ours
    folder = ROOT / "helpers/pipeline/weights"
    expected = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert {"pipeline.json", "busi-alone/pipeline.json"} <= expected
    assert set(weights.split()) == expected
    assert set(exported.split()) == {"README.md", "index.html"}


def test_the_installed_package_reads_its_data(installed):
    libraries = sysconfig.get_path("purelib")  # as a folder: the checkout that is installed there stays out
    code = (
        "import helpers\n"
        "from helpers import data, pipeline, results\n"
        "print(helpers.__file__)\n"
        "print(len(results.load_all(results.committed_folder())))\n"
        "print(*(file.name for file in results.committed_folder().glob('*.csv')))\n"
        "print((results.committed_folder() / 'bulk' / 'scaling.json').is_file())\n"
        "print(len(pipeline.load().detectors), len(pipeline.load(pipeline.BUSI_ALONE).detectors))\n"
    )
    file, rows, ablations, runs, detectors = run(installed, code, PYTHONPATH=libraries)
    assert Path(file).is_relative_to(installed.parent.parent)
    assert int(rows) == len(list((ROOT / "results").glob("*.json"))) > 0
    measured = ("ablation", "detectors", "encoders", "encoders_without_bfloat16", "unet", "unet_cost", "vgg")
    assert set(ablations.split()) == {f"{name}.csv" for name in measured}
    assert runs == "True"
    assert detectors == "4 4"
