"""Execute the notebooks in order: `python notebooks/execute.py`, which is `make run`.

Leaves in `executed/` an executed copy and an HTML page of each notebook, and `index.html`: minutes, a
picture and the main numbers of each. A notebook that fails is kept up to its error and listed as failed;
the others still run.
"""

import argparse
import base64
import html
import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import cv2
import nbformat
import numpy as np
import zmq
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from traitlets import default
from traitlets.config import Config

from helpers import cache, params

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Breast ultrasound notebooks</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; }}
body {{ padding: 0 1rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.2rem; }}
article {{ border: 1px solid #ddd; border-radius: .5rem; padding: 1rem; overflow-wrap: anywhere; }}
article img {{ width: 100%; height: 9rem; object-fit: contain; }}
h2 {{ font-size: 1.1rem; margin: .5rem 0; }}
.note {{ color: #666; font-size: .9rem; }}
.failed, .synthetic {{ color: #b00020; font-weight: 600; }}
</style>
<h1>Breast ultrasound notebooks</h1>
<p>{total} Executed {when}, {profile} profile. For research and teaching only.</p>
<p class="synthetic">{synthetic}</p>
<main>
{cards}
</main>
</html>
"""
CARD = """<article>
<a href="{stem}.html">{picture}</a>
<h2><a href="{stem}.html">{title}</a></h2>
<p class="note"><span class="{outcome}">{outcome}</span> in {minutes:.1f} min
· <a href="{stem}.ipynb">{stem}.ipynb</a></p>
{finding}
</article>"""
BACK = "[← All notebooks](index.html)"
SYNTHETIC = "Data: SYNTHETIC"  # how `data.load_dataset` begins where it makes images


def main(arguments=None):
    """Execute notebooks and return the number that failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: notebooks/*.ipynb")
    parser.add_argument("--out", type=Path, default=Path("executed"), help="folder of the copies")
    options = parser.parse_args(arguments)
    paths = options.notebooks or sorted(Path("notebooks").glob("*.ipynb"))
    if not paths:
        parser.error("no notebook in notebooks/; run this from the repository's root")
    os.environ.setdefault("NB_DRAW", "no")  # nobody is there to draw
    # results/ holds what is committed; a run writes there only when told to.
    os.environ.setdefault("NB_RESULTS", str((options.out / "results").absolute()))
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    clock = Clock([_stated_minutes(notebook) for notebook in notebooks])
    rows = []
    for path, notebook in zip(paths, notebooks):
        rows.append(execute(path, notebook, options.out, clock))
        cache.write(options.out / "index.html", _index(rows, len(paths)))
    failed = [row["stem"] for row in rows if row["outcome"] == "failed"]
    minutes = sum(row["minutes"] for row in rows)
    print(*dict.fromkeys(["", *(row["synthetic"] for row in rows)]), sep="\n")
    print(f"{options.out / 'index.html'} lists {len(rows)} notebooks, {minutes:.1f} minutes", end="")
    print(f"; failed: {', '.join(failed)}" if failed else ", all ran through")
    return len(failed)


def execute(path, notebook, out, clock):
    """Execute a notebook read from `path`, write its copy and its page to `out`; return a dict for `CARD`."""
    opening = notebook.cells[0].source if notebook.cells else ""
    title = opening.partition("\n")[0].lstrip("# ") or path.stem
    print(f"{title}: {_takes(notebook) or 'running'} ...", flush=True)
    outcome = "ran through"
    clock.start(len(notebook.cells))
    try:
        _run(notebook, clock)
    except Exception as error:  # of a cell, of a kernel that died (out of memory?) or never started
        outcome = "failed"
        lines = str(error).strip().splitlines() or [repr(error)]
        print(f"  failed: {lines[-1]}", file=sys.stderr)
    minutes = clock.stop()
    shown = _what_it_shows(notebook)
    made = ", on SYNTHETIC images" if shown["synthetic"] else ""
    print(f"  {outcome} in {minutes:.1f} minutes{made}".ljust(60), flush=True)  # over the last cell's line
    cache.write(out / path.name, nbformat.writes(notebook) + "\n")
    exporter = HTMLExporter()
    exporter.log.setLevel(logging.ERROR)  # it asks for alternative texts, which plots have none of
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(BACK))
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
    cache.write(out / f"{path.stem}.html", page)
    about = {"stem": path.stem, "title": html.escape(title), "outcome": outcome, "minutes": minutes}
    return about | shown


class Clock:
    """Says on the console how far a run is, and how long it still takes by what the notebooks state."""

    def __init__(self, stated):
        self.waiting, self.stated_so_far, self.spent_so_far = list(stated), 0, 0
        self.started = self.said = time.perf_counter()

    def start(self, cells):
        self.stated, self.cells = self.waiting.pop(0), cells
        self.started = self.said = time.perf_counter()

    def show(self, cell, cell_index):
        """Say which cell begins: in place in a terminal, in a log at most twice a minute."""
        spent, terminal = (time.perf_counter() - self.started) / 60, sys.stdout.isatty()
        if cell.cell_type != "code" or not (terminal or time.perf_counter() - self.said >= 30):
            return
        pace = (5 + self.spent_so_far) / (5 + self.stated_so_far)  # as stated, until there is more to go by
        left = max(self.stated * pace - spent, 0) + sum(self.waiting) * pace
        at = f"  cell {cell_index + 1} of {self.cells}, {spent:.1f} minutes; about {left:.0f} left in all"
        print(at.ljust(60) if terminal else at, end="\r" if terminal else "\n", flush=True)
        self.said = time.perf_counter()

    def stop(self):
        """Return the minutes since the start."""
        spent = (time.perf_counter() - self.started) / 60
        self.stated_so_far += self.stated
        self.spent_so_far += spent
        return spent


def _takes(notebook):
    """Return what the opening says of the time, "" where it says nothing."""
    found = re.search(r"\*\*Takes\*\* ([^.]*)", notebook.cells[0].source if notebook.cells else "")
    return found[1].replace("\n ", "") if found else ""


def _stated_minutes(notebook):
    """Return the minutes that the opening states for the profile of this run: quick first, then full."""
    numbers = re.findall(r"about (\d+)", _takes(notebook)) or ["1"]
    return float(numbers[min(params.profile() == "full", len(numbers) - 1)])


def _index(rows, of):
    """Return the HTML page that lists the notebooks that have run."""
    failed = sum(row["outcome"] == "failed" for row in rows)
    total = f"{len(rows)} of {of} notebooks in {sum(row['minutes'] for row in rows):.1f} minutes; "
    return PAGE.format(
        total=total + (f"<span class=failed>{failed} failed</span>." if failed else "none failed."),
        when=time.strftime("%Y-%m-%d %H:%M"),
        profile=params.profile(),
        synthetic=html.escape(next((row["synthetic"] for row in rows if row["synthetic"]), "")),
        cards="\n".join(CARD.format(**row) for row in rows),
    )


def _what_it_shows(notebook):
    """Return the first figure, small, the finding in bold of the last cell, and what the data line says."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "\n".join(output.text for output in outputs if output.output_type == "stream").splitlines()
    shown = [output.data for output in outputs if "data" in output]
    figures = [data["image/png"] for data in shown if "image/png" in data]
    learned = [data["text/markdown"] for data in shown if "text/markdown" in data][-1:]
    points = [point for text in learned for point in re.split(r"\n(?=- )", text) if "**" in point]
    return {
        "picture": _thumbnail(figures[0]) if figures else "",
        "finding": markdown2html(points[0].removeprefix("- ")) if points else "",
        "synthetic": next((line for line in printed if line.startswith(SYNTHETIC)), ""),
    }


def _thumbnail(png):
    """Return an `img` element of a figure of base64 PNG, 480 pixels wide."""
    figure = cv2.imdecode(np.frombuffer(base64.b64decode(png), np.uint8), cv2.IMREAD_COLOR)
    size = 480, max(round(480 * figure.shape[0] / figure.shape[1]), 1)
    jpeg = cv2.imencode(".jpg", cv2.resize(figure, size, interpolation=cv2.INTER_AREA))[1]
    return f'<img alt="its first figure" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


class Kernel(AsyncKernelManager):
    """Runs this very Python, whatever kernel of the same name is installed or on JUPYTER_PATH."""

    @default("kernel_spec_manager")
    def _no_installed_kernels(self):
        return KernelSpecManager(kernel_dirs=[])


def _run(notebook, clock):
    """Execute a notebook in place, by a kernel whose connection file and sockets no other run can meet."""
    with tempfile.TemporaryDirectory(prefix="kernel-", ignore_cleanup_errors=True) as folder:
        connection = {"connection_file": f"{folder}/k.json"}
        # Sockets in the file system: kernels warn of unencrypted TCP. Their paths must be short.
        if zmq.has("ipc") and len(f"{folder}/k-ipc-5") <= 100:
            connection["transport"] = "ipc"
        settings = {"config": Config(KernelManager=connection), "kernel_manager_class": Kernel}
        settings |= {"coalesce_streams": True, "on_cell_start": clock.show}
        client = NotebookClient(notebook, timeout=None, kernel_name="python3", **settings)
        client.create_kernel_manager()
        client.start_new_kernel(cwd=str(Path.cwd()))
        client.start_new_kernel_client()  # of a kernel that is ready
        client.execute(reset_kc=False)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a title may hold what the terminal can't show
    sys.exit(main())
