"""Each lesson cell runs with nothing before it but its notebook's imports, settings and data cells.

A reader copies it into an empty notebook. A *data cell* is tagged `data`: it reads images, or makes the
network that lessons look at; where a lesson continues an earlier one, that one is tagged `data` too.
"""

import nbformat
import pytest
from test_notebook_style import PATHS


@pytest.mark.filterwarnings("ignore:Traits should be given as instances")  # jupyter-bbox-widget's
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_lesson_cells_stand_alone(path, monkeypatch):
    import matplotlib

    matplotlib.use("agg")
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"][1:]
    names: dict = {"__name__": "__main__"}
    exec(code[0].source, names)  # imports and settings
    for cell in code[1:]:
        tags = cell.metadata.get("tags", [])
        if tags:
            alone = dict(names)
            exec(compile(cell.source, f"{path.stem}: {tags}", "exec"), alone)
            names = alone if "data" in tags else names
    matplotlib.pyplot.close("all")
