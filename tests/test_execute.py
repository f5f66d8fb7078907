import sys
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "notebooks"))
import execute as run  # noqa: E402


def notebook(path, *cells):
    opening = nbformat.v4.new_markdown_cell(
        "# 01 · A title\n\n- **Takes** about 1 second on one core."
    )
    made = nbformat.v4.new_notebook(cells=[opening, *map(nbformat.v4.new_code_cell, cells)])
    nbformat.write(made, path)
    return str(path)


@pytest.fixture
def executed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NB_DRAW", "no")
    good = notebook(tmp_path / "01_good.ipynb", "1 + 1", "import os\nprint(os.environ['NB_DRAW'])")
    bad = notebook(tmp_path / "02_bad.ipynb", "print('so far')", "1 / 0", "print('never')")
    last = notebook(tmp_path / "03_last.ipynb", "print('after')")
    failed = run.main([good, bad, last, "--out", str(tmp_path / "out")])
    return failed, tmp_path / "out", capsys.readouterr()


def test_runs_all_keeps_copies_and_lists_them(executed):
    failed, out, printed = executed
    assert failed == 1
    assert "01 · A title: about 1 second on one core ..." in printed.out
    assert "failed: 02_bad" in printed.out
    assert "ZeroDivisionError" in printed.err
    page = (out / "index.html").read_text()
    assert page.count("ran through</td>") == 2
    assert page.count("failed</td>") == 1
    for stem in ("01_good", "02_bad", "03_last"):
        assert f'href="{stem}.html"' in page
        assert (out / f"{stem}.html").stat().st_size > 10_000
    good = nbformat.read(out / "01_good.ipynb", as_version=4)
    assert good.cells[1].outputs[0].data["text/plain"] == "2"
    assert good.cells[2].outputs[0].text == "no\n"


def test_a_failed_notebook_is_kept_up_to_its_error(executed):
    bad = nbformat.read(executed[1] / "02_bad.ipynb", as_version=4)
    assert bad.cells[1].outputs[0].text == "so far\n"
    assert bad.cells[2].outputs[0].ename == "ZeroDivisionError"
    assert not bad.cells[3].outputs


def test_a_dead_kernel_fails_its_notebook_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NB_DRAW", "no")
    dead = notebook(tmp_path / "01_dead.ipynb", "import os\nos._exit(137)")
    after = notebook(tmp_path / "02_after.ipynb", "1 + 1")
    assert run.main([dead, after, "--out", str(tmp_path / "out")]) == 1
    assert "died" in capsys.readouterr().err
    assert "02_after.html" in (tmp_path / "out/index.html").read_text()


def test_no_notebooks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run.main([])
    assert "run this from the repository's root" in capsys.readouterr().err
