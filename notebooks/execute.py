"""Execute the notebooks in order: `python notebooks/execute.py`, which is `make run`.

Leaves an executed copy and an HTML page of each notebook in `executed/`, and `index.html` that lists
them. A notebook that fails is kept up to its error and listed as failed; the others still run.
"""

import argparse
import html
import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import zmq
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from traitlets import default
from traitlets.config import Config

from helpers import cache

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
    os.environ.setdefault("NB_DRAW", "no")  # nobody is there to draw
    # results/ holds what is committed; a run writes there only when told to.
    os.environ.setdefault("NB_RESULTS", str((options.out / "results").absolute()))
    rows = []
    for path in notebooks:
        rows.append(execute(path, options.out))
        listed = "\n".join(ROW.format(**row) for row in rows)
        page = PAGE.format(when=time.strftime("%Y-%m-%d %H:%M"), rows=listed)
        cache.write(options.out / "index.html", page)
    failed = [row["stem"] for row in rows if row["outcome"] == "failed"]
    print(f"\n{options.out / 'index.html'} lists {len(rows)} notebooks", end="")
    print(f"; failed: {', '.join(failed)}" if failed else ", all ran through")
    return len(failed)


def execute(path, out):
    """Execute the notebook at `path`, write its copy and its page to `out`; return a dict for `ROW`."""
    notebook = nbformat.read(path, as_version=4)
    opening = notebook.cells[0].source if notebook.cells else ""
    title = opening.partition("\n")[0].lstrip("# ") or path.stem
    takes = re.search(r"\*\*Takes\*\* ([^.]*)", opening)
    print(f"{title}: {takes[1] if takes else 'running'} ...", flush=True)
    start, outcome = time.perf_counter(), "ran through"
    try:
        _run(notebook)
    except Exception as error:  # of a cell, of a kernel that died (out of memory?) or never started
        outcome = "failed"
        lines = str(error).strip().splitlines() or [repr(error)]
        print(f"  failed: {lines[-1]}", file=sys.stderr)
    minutes = (time.perf_counter() - start) / 60
    exporter = HTMLExporter()
    exporter.log.setLevel(logging.ERROR)  # it asks for alternative texts, which plots have none of
    cache.write(out / path.name, nbformat.writes(notebook) + "\n")
    cache.write(out / f"{path.stem}.html", exporter.from_notebook_node(notebook)[0])
    print(f"  {outcome} in {minutes:.1f} minutes", flush=True)
    return {"stem": path.stem, "title": html.escape(title), "outcome": outcome, "minutes": minutes}


class Kernel(AsyncKernelManager):
    """Runs this very Python, whatever kernel of the same name is installed or on JUPYTER_PATH."""

    @default("kernel_spec_manager")
    def _no_installed_kernels(self):
        return KernelSpecManager(kernel_dirs=[])


def _run(notebook):
    """Execute a notebook in place, by a kernel whose connection file and sockets no other run can meet."""
    with tempfile.TemporaryDirectory(prefix="kernel-", ignore_cleanup_errors=True) as folder:
        connection = {"connection_file": f"{folder}/k.json"}
        # Sockets in the file system: kernels warn of unencrypted TCP. Their paths must be short.
        if zmq.has("ipc") and len(f"{folder}/k-ipc-5") <= 100:
            connection["transport"] = "ipc"
        settings = {"config": Config(KernelManager=connection), "kernel_manager_class": Kernel}
        client = NotebookClient(
            notebook, timeout=None, kernel_name="python3", coalesce_streams=True, **settings
        )
        client.create_kernel_manager()
        client.start_new_kernel(cwd=str(Path.cwd()))
        client.start_new_kernel_client()  # of a kernel that is ready
        client.execute(reset_kc=False)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a title may hold what the terminal can't show
    sys.exit(main())
