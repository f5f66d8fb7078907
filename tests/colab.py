"""Run every notebook in the test profile with Colab's versions: `python3.13 tests/colab.py FOLDER`.

Makes an environment in FOLDER with what Colab had in August 2026, adds what the notebooks' setup cell and the
openings of 09 and 10 install there, and executes the notebooks into FOLDER/executed: ten minutes, 8 GB.
"""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

COLAB = """torch==2.11.* torchvision==0.26.* tensorflow==2.20.* keras==3.13.* transformers==5.15.*
numpy==2.1.* pandas==2.2.* ipywidgets==7.7.* scipy scikit-learn scikit-image opencv-python matplotlib pillow
joblib tqdm safetensors accelerate kagglehub<2 huggingface_hub pyarrow ipykernel nbclient nbconvert"""


def main(folder):
    """Return how many notebooks failed."""
    if sys.version_info[:2] != (3, 13):
        raise SystemExit(f"Colab has Python 3.13, this is {sys.version.split()[0]}")
    paths = sorted(Path("notebooks").glob("*.ipynb"))
    python = folder / "env" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "env", with_pip=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *COLAB.split()], check=True)
        subprocess.run([*pip, "--no-deps", ".", *_lacking(paths[0])], check=True)
        subprocess.run([*pip, "ray[data,tune]", "optuna"], check=True)
    check = [python, "-m", "pip", "list", "--format=freeze"]
    listed = subprocess.run(check, check=True, capture_output=True, text=True).stdout
    print(re.findall(r"(?m)^(?:torch|tensorflow|keras|transformers|numpy|ipywidgets)==.*$", listed))
    environment = os.environ | {"NB_PROFILE": "test", "NB_CACHE": str(folder / "cache")}
    run = [python, "notebooks/execute.py", "--out", folder / "executed"]
    return subprocess.run(run, env=environment).returncode


def _lacking(path):
    """Return the packages that the setup cell of a notebook installs on Colab."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    setup = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    names = {}
    exec("\n".join(line.strip() for line in setup.splitlines() if "LACKING " in line), names)
    return names["LACKING"]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
