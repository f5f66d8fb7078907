"""Settings for the notebooks that pytest runs, and the small synthetic set that the tests share."""

import gc
import os
import re
import tempfile
import threading

import pytest
from tqdm import tqdm
from xdist.scheduler import LoadFileScheduling

RESULTS = tempfile.TemporaryDirectory(prefix="results-")  # removed at exit
CACHE = tempfile.TemporaryDirectory(prefix="cache-")
# tqdm's own lock is shared with forked processes: one that a test kills may hold it, and nothing goes on.
tqdm.set_lock(threading.RLock())

if os.environ.get("NB_PROFILE") != "full":  # as `make test-gpu` says: real images, with the runner's cache
    # nbval's kernels inherit these. A notebook's own text is never rewritten.
    os.environ |= {"NB_PROFILE": "test", "NB_CACHE": CACHE.name, "NB_RESULTS": RESULTS.name}
    # Two workers share two cores, one each: with a thread pool in each, threads mostly wait for one another.
    os.environ |= {
        "LOKY_MAX_CPU_COUNT": "1",  # for Ray
        "OMP_NUM_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
    }


# What takes longest comes first, so that all workers end together; last comes what reads the others' results.
ORDER = ("09", "04", "05", "10", "08", "07", "03", "02", "01", "test_search", "test_unet", "test_bulk")
ORDER += ("test_finetune", "test_execute", "test_", "06")

# Besides the notebooks, `make test-fast` leaves out Ray, kernels, other processes and long trainings: these
# files, and tests with such words in their names.
SLOW_FILES = ("test_search", "test_bulk", "test_execute", "test_wheel", "test_export")
SLOW_FILES += ("test_train", "test_detector", "test_finetune", "test_training")
SLOW_NAMES = re.compile(
    "stopped_run|finished_run|learns|learnt|processes_build|one_process|half_precision|bfloat16"
    "|published_steps|released|by_hand|own_file|torch_backend|epoch|no_number|each_fold"
    "|kill|locale|pretrained_first|channels_first|save_and_load"
)


class Scheduling(LoadFileScheduling):
    """A file goes to one worker whole; one takes notebooks 04, 05 and 07, which train the same U-Net."""

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return "notebooks" if file.startswith(("notebooks/04", "notebooks/05", "notebooks/07")) else file


def pytest_xdist_make_scheduler(config, log):
    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    """Mark what is slow, and sort by `ORDER`."""

    def place(item):
        return next(k for k, start in enumerate(ORDER) if item.path.stem.startswith(start))

    for item in items:
        file, test = item.path.stem, item.name.partition("[")[0]
        if item.path.suffix == ".ipynb" or file in SLOW_FILES or SLOW_NAMES.search(test):
            item.add_marker("slow")
    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def _freeze():
    """Let garbage collections, one after each training, pass over what earlier files left, which is much."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def synthetic_root(tmp_path_factory):
    """Root of a synthetic set with 8 images per class."""
    from helpers.synthetic import make_busi

    return make_busi(tmp_path_factory.mktemp("synthetic") / "busi", 8)


@pytest.fixture(scope="session")
def index(synthetic_root):
    from helpers import data

    return data.load_index(synthetic_root)


@pytest.fixture
def synthetic_copy(synthetic_root, tmp_path):
    """The same set, free to be damaged."""
    import shutil

    return shutil.copytree(synthetic_root, tmp_path / "busi")


BOX = [20, 15, 100, 70]  # in `image`


@pytest.fixture
def image():
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def lite():
    from helpers import sam

    return sam.load("lite-medsam", device="cpu")


@pytest.fixture(scope="module")
def released():
    import reference

    return reference.lite_medsam()


@pytest.fixture
def run(index):
    """Scores of ellipses in the boxes of three lesions per label, and their rows."""
    from helpers import data, metrics, prompts

    rows = data.lesions(data.split(index).groupby("label").head(3))
    return metrics.score(rows, prompts.fill_ellipses(rows, prompts.truth_boxes(rows))), rows
