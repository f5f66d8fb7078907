"""Execute the notebooks in order: `python -m helpers.run`, which is `make run`.

Leaves an executed copy and an HTML page of each notebook in `executed/`, and `index.html` that lists
them. A notebook that fails is kept up to its error and listed as failed; the others still run.
"""

import argparse
import html
import logging
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter
from traitlets.config import Config

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Breast ultrasound notebooks</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 3rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; padding: .5rem .8rem; border-bottom: 1px solid #ddd; }}
.failed {{ color: #b00020; font-weight: 600; }}
</style>
<h1>Breast ultrasound notebooks</h1>
<p>Executed {when}.</p>
<table>
<tr><th>Notebook</th><th>Outcome</th><th>Time</th><th>Executed copy</th></tr>
{rows}
</table>
</html>
"""
ROW = (
    '<tr><td><a href="{stem}.html">{title}</a></td><td class="{outcome}">{outcome}</td>'
    '<td>{minutes:.1f} min</td><td><a href="{stem}.ipynb">{stem}.ipynb</a></td></tr>'
)


def main(arguments=None):
    """Execute notebooks and return the number that failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: notebooks/*.ipynb")
    parser.add_argument("--out", type=Path, default=Path("executed"), help="folder of the copies")
    options = parser.parse_args(arguments)
    notebooks = options.notebooks or sorted(Path("notebooks").glob("*.ipynb"))
    if not notebooks:
        parser.error("no notebook in notebooks/; run this from the repository's root")
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("NB_DRAW", "no")  # nobody is there to draw
    # results/ holds what is committed; a run writes there only when told to.
    os.environ.setdefault("NB_RESULTS", str((options.out / "results").absolute()))
    rows = []
    for path in notebooks:
        rows.append(execute(path, options.out))
        write_page(rows, options.out)
    failed = [row["stem"] for row in rows if row["outcome"] == "failed"]
    print(f"\n{options.out / 'index.html'} lists {len(rows)} notebooks", end="")
    print(f"; failed: {', '.join(failed)}" if failed else ", all ran through")
    return len(failed)


def execute(path, out):
    """Execute one notebook; write its copy and its page.

    Args:
        path: of the notebook.
        out: folder for `<stem>.ipynb` and `<stem>.html`.

    Returns:
        dict for `ROW`.
    """
    notebook = nbformat.read(path, as_version=4)
    opening = notebook.cells[0].source if notebook.cells else ""
    title = opening.partition("\n")[0].lstrip("# ") or path.stem
    takes = re.search(r"\*\*Takes\*\* ([^.]*)", opening)
    print(f"{title}: {takes[1] if takes else 'running'} ...", flush=True)
    # Sockets in the file system: kernels warn of unencrypted TCP.
    config = Config(KernelManager={"transport": "ipc"})
    client = NotebookClient(
        notebook, timeout=None, kernel_name="python3", coalesce_streams=True, config=config
    )
    start = time.perf_counter()
    outcome = "ran through"
    try:
        client.execute(cwd=str(Path.cwd()))
    except (CellExecutionError, DeadKernelError) as error:
        outcome = "failed"  # a dead kernel most often ran out of memory
        print(f"  failed: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
    minutes = (time.perf_counter() - start) / 60
    nbformat.write(notebook, out / path.name)
    (out / f"{path.stem}.html").write_text(_page_of(notebook))
    print(f"  {outcome} in {minutes:.1f} minutes", flush=True)
    return {"stem": path.stem, "title": html.escape(title), "outcome": outcome, "minutes": minutes}


def _page_of(notebook):
    exporter = HTMLExporter()
    exporter.log.setLevel(logging.ERROR)  # it asks for alternative texts, which plots have none of
    return exporter.from_notebook_node(notebook)[0]


def write_page(rows, out):
    """Write `index.html`, which lists the notebooks executed so far."""
    listed = "\n".join(ROW.format(**row) for row in rows)
    (out / "index.html").write_text(PAGE.format(when=time.strftime("%Y-%m-%d %H:%M"), rows=listed))


if __name__ == "__main__":
    sys.exit(main())
