"""The table of variants that a benchmark measures: a file of results/, one line for each."""

import pandas as pd

from helpers import cache, results


def write(name, line, variants):
    """Put a line into results/<name>.csv, in place of an older one of the same variant."""
    path = results.folder() / f"{name}.csv"
    known = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["variant"])
    table = pd.concat([known[known.variant != line["variant"]], pd.DataFrame([line])]).set_index("variant")
    order = [variant for variant in variants if variant in table.index]
    cache.write(path, table.loc[order].reset_index().round(4).to_csv(index=False))
