"""Executing notebooks: each in a kernel of its own, whatever happens to the others."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
import execute  # noqa: E402


def notebook(path, *cells):
    opening = nbformat.v4.new_markdown_cell("# 01 · A title\n\n- **Takes** about 1 second on one core.")
    made = nbformat.v4.new_notebook(cells=[opening, *map(nbformat.v4.new_code_cell, cells)])
    nbformat.write(made, path)
    return str(path)


def start(*arguments, **environment):
    """Start `execute.py` as a reader would, from here, with its output to read."""
    command = [sys.executable, str(NOTEBOOKS / "execute.py"), *map(str, arguments)]
    root = str(NOTEBOOKS.parent)
    path = os.pathsep.join([root, *filter(None, [environment.pop("PYTHONPATH", "")])])
    return subprocess.Popen(
        command,
        env=os.environ | environment | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def output_of(path, cell=1):
    return nbformat.read(path, as_version=4).cells[cell].outputs[0].text


@pytest.fixture
def executed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NB_DRAW", "no")
    good = notebook(tmp_path / "01_good.ipynb", "1 + 1", "import os\nprint(os.environ['NB_DRAW'])")
    bad = notebook(tmp_path / "02_bad.ipynb", "print('so far')", "1 / 0", "print('never')")
    last = notebook(tmp_path / "03_last.ipynb", "print('after')")
    failed = execute.main([good, bad, last, "--out", str(tmp_path / "out")])
    return failed, tmp_path / "out", capsys.readouterr()


def test_runs_all_keeps_copies_and_lists_them(executed):
    failed, out, printed = executed
    assert failed == 1
    assert "01 · A title: about 1 second on one core ..." in printed.out
    assert "failed: 02_bad" in printed.out
    assert "ZeroDivisionError" in printed.err
    page = (out / "index.html").read_text()
    assert page.count('<span class="ran through">') == 2
    assert page.count('<span class="failed">') == 1
    assert re.search(r"3 of 3 notebooks in 0\.\d minutes; <span class=failed>1 failed</span>", page)
    for stem in ("01_good", "02_bad", "03_last"):
        assert f'href="{stem}.html"' in page
        assert (out / f"{stem}.html").stat().st_size > 10_000
    good = nbformat.read(out / "01_good.ipynb", as_version=4)
    assert good.cells[1].outputs[0].data["text/plain"] == "2"
    assert good.cells[2].outputs[0].text == "no\n"


def test_index_shows_the_figure_and_the_finding_and_pages_lead_back(tmp_path, capsys):
    draw = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"
    learn = (
        "from IPython.display import Markdown\nMarkdown('- One.\\n- Dice is **0.8**\\n  here.\\n- Three.')"
    )
    said = "print('Data: SYNTHETIC images, not patients (no network)')"
    path = notebook(tmp_path / "01_all.ipynb", said, "%matplotlib inline\n" + draw, learn)
    assert execute.main([path, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("Data: SYNTHETIC images, not patients (no network)") == 1
    page = (tmp_path / "out/index.html").read_text()
    assert '<img alt="its first figure" src="data:image/jpeg;base64,' in page
    assert "Dice is <strong>0.8</strong>" in page
    assert "One." not in page
    assert '<p class="synthetic">Data: SYNTHETIC images, not patients (no network)</p>' in page
    single = (tmp_path / "out/01_all.html").read_text()
    assert "<title>01 · A title</title>" in single
    assert '<a href="index.html">← All notebooks</a>' in single
    assert not any(
        cell.source == execute.BACK for cell in nbformat.read(tmp_path / "out/01_all.ipynb", 4).cells
    )


def test_the_console_says_which_cell_runs_and_what_is_left(capsys, monkeypatch):
    cell = nbformat.v4.new_code_cell("1")
    clock = execute.Clock([4, 10])
    clock.start(20)
    clock.show(cell, 1)
    assert capsys.readouterr().out == ""  # no half minute has passed
    clock.started -= 120
    clock.said -= 120
    clock.show(cell, 4)
    assert capsys.readouterr().out == "  cell 5 of 20, 2.0 minutes; about 12 left in all\n"
    clock.stop()
    clock.start(10)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    clock.show(cell, 1)
    shown = capsys.readouterr().out
    assert shown.rstrip() == "  cell 2 of 10, 0.0 minutes; about 8 left in all"
    assert shown.endswith(" \r")  # blanks over the end of a longer line before it


def test_minutes_are_those_of_the_profile(monkeypatch):
    text = (
        "# T\n\n- **Takes** about 4 minutes on 2 CPU cores (quick), about\n  45 in full; less when run again."
    )
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    for profile, minutes in (("quick", 4), ("full", 45)):
        monkeypatch.setenv("NB_PROFILE", profile)
        assert execute._stated_minutes(made) == minutes


def test_a_failed_notebook_is_kept_up_to_its_error(executed):
    bad = nbformat.read(executed[1] / "02_bad.ipynb", as_version=4)
    assert bad.cells[1].outputs[0].text == "so far\n"
    assert bad.cells[2].outputs[0].ename == "ZeroDivisionError"
    assert not bad.cells[3].outputs


def test_a_dead_kernel_fails_its_notebook_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NB_DRAW", "no")
    dead = notebook(tmp_path / "01_dead.ipynb", "import os\nos._exit(137)")
    after = notebook(tmp_path / "02_after.ipynb", "1 + 1")
    assert execute.main([dead, after, "--out", str(tmp_path / "out")]) == 1
    assert "died" in capsys.readouterr().err
    assert "02_after.html" in (tmp_path / "out/index.html").read_text()


def test_a_kernel_that_does_not_start_fails_its_notebook_alone(tmp_path, monkeypatch, capfd):
    # This launcher exits at its first call and starts a kernel at every later one.
    (tmp_path / "ipykernel_launcher.py").write_text(
        "import pathlib, sys\n"
        "broken = pathlib.Path(__file__).with_name('broken')\n"
        "if broken.exists():\n"
        "    broken.unlink()\n"
        "    sys.exit('no kernel today')\n"
        "from ipykernel import kernelapp\n"
        "kernelapp.launch_new_instance()\n"
    )
    (tmp_path / "broken").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    first = notebook(tmp_path / "01_first.ipynb", "print(1)")
    second = notebook(tmp_path / "02_second.ipynb", "print(2)")
    assert execute.main([first, second, "--out", str(tmp_path / "out")]) == 1
    printed = capfd.readouterr()
    assert "no kernel today" in printed.err
    assert "  failed: Kernel died" in printed.err
    assert "failed: 01_first" in printed.out
    assert not nbformat.read(tmp_path / "out/01_first.ipynb", as_version=4).cells[1].outputs
    assert output_of(tmp_path / "out/02_second.ipynb") == "2\n"


def test_a_foreign_kernel_of_the_same_name_is_not_used(tmp_path, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    foreign = {"argv": ["false", "{connection_file}"], "display_name": "x", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(foreign))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    path = notebook(tmp_path / "01_which.ipynb", "import sys\nprint(sys.executable)")
    assert execute.main([path, "--out", str(tmp_path / "out")]) == 0
    assert output_of(tmp_path / "out/01_which.ipynb") == sys.executable + "\n"


def test_two_runs_in_one_folder_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell = "import os, time\ntime.sleep(1)\nprint(os.environ['NB_SEED'])"
    paths = [notebook(tmp_path / f"0{k}_both.ipynb", cell) for k in (1, 2)]
    runs = [start(*paths, "--out", f"out{k}", NB_SEED=str(k)) for k in (1, 2, 3)]
    printed = [run.communicate(timeout=100)[0].decode() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], printed
    for k in (1, 2, 3):
        for stem in ("01_both", "02_both"):
            assert output_of(tmp_path / f"out{k}/{stem}.ipynb") == f"{k}\n"
    # Neither connection files nor sockets are left where the runs were started.
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"01_both.ipynb", "02_both.ipynb", "out1", "out2", "out3"}


def test_a_temporary_folder_too_deep_for_sockets(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    path = notebook(tmp_path / "01_deep.ipynb", "print('ran')")
    assert execute.main([path, "--out", str(tmp_path / "out")]) == 0
    assert output_of(tmp_path / "out/01_deep.ipynb") == "ran\n"
    assert not list(deep.iterdir())


def test_files_are_utf8_in_a_c_locale(tmp_path):
    path = notebook(tmp_path / "01_uni.ipynb", "print('Pawłowska · 乳腺 → ✓')")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    run = start(path, "--out", tmp_path / "out", **plain)
    printed = run.communicate(timeout=100)[0]
    assert run.returncode == 0, printed
    assert b"01 ? A title" in printed  # the terminal of this run holds ASCII alone
    assert output_of(tmp_path / "out/01_uni.ipynb") == "Pawłowska · 乳腺 → ✓\n"
    assert "乳腺" in (tmp_path / "out/01_uni.html").read_text(encoding="utf-8")
    assert "01 · A title" in (tmp_path / "out/index.html").read_text(encoding="utf-8")


def test_no_notebooks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        execute.main([])
    assert "run this from the repository's root" in capsys.readouterr().err
