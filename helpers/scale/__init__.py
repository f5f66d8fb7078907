"""Many trainings (`search`), or more images than one machine holds (`bulk`): needs requirements-scale.txt."""

import importlib.util

for needed in ("ray", "pyarrow", "optuna"):
    if importlib.util.find_spec(needed) is None:
        raise ImportError(
            f"helpers.scale needs {needed}, which is not installed; say `pip install -r "
            'requirements-scale.txt`, or without the repository `pip install "ray[data,tune]" optuna`'
        )
