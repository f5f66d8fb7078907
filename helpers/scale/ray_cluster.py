"""Ray for the work that goes over several cores or machines: here, or on the cluster of $RAY_ADDRESS."""

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import joblib

from helpers.quiet import quiet_stderr

SHARED = Path("/dev/shm")  # where Ray keeps the objects that its processes share
STORE = 256 * 2**20  # bytes of that, where there are so many
LEAST = 80 * 2**20  # bytes; Ray refuses an object store of under 75 MiB
PATIENCE = 5  # seconds until a cluster's address must answer
# One thread a worker: there are as many workers as cores.
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
THREADS |= dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), "1")
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # What goes wrong is raised; the backend's notes would come as errors on stderr (ray-project/ray#57733).
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}


def start():
    """Join the Ray cluster that $RAY_ADDRESS names, or start Ray on this machine; return the module `ray`.

    A Ray that this process already uses is used again. On this machine Ray gets every core that the process
    may use (a container's share; $LOKY_MAX_CPU_COUNT). On a cluster the package is sent along; what it
    imports must be installed there.

    Raises:
        ConnectionError: $RAY_ADDRESS is no address, nothing answers there within 5 seconds, or the cluster
            there refuses.
        RuntimeError: too little shared memory, or Ray did not start (it gives up after 30 seconds).
    """
    os.environ |= {name: os.environ.get(name, value) for name, value in QUIET.items()}
    import ray

    if ray.is_initialized():
        return ray
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address != "local":
        _check_answers(address)
        package = {"env_vars": THREADS, "py_modules": [str(Path(__file__).parent.parent)]}
        try:
            with quiet_stderr():
                ray.init(address, runtime_env=package, **quiet)
        except Exception as error:  # of many kinds, by what the cluster refuses
            raise ConnectionError(
                f"the cluster at RAY_ADDRESS {address!r} did not let this process join "
                f"({_first_line(error)}); it must run the same versions of Ray and Python, and where it "
                "asks for a token RAY_AUTH_MODE=token must be set here too"
            ) from error
        return ray
    memory = _room()
    try:
        with quiet_stderr():
            ray.init(
                "local",
                num_cpus=joblib.cpu_count(),
                object_store_memory=memory,
                include_dashboard=False,
                runtime_env={"env_vars": THREADS},
                **quiet,
            )
    except Exception as error:  # bare, where one of Ray's processes did not start
        ray.shutdown()
        raise RuntimeError(
            f"Ray did not start on this machine ({_first_line(error)}); end what is left of an "
            "earlier Ray with `ray stop`, and see that local ports may be opened and that there is room "
            "in the temporary folder"
        ) from error
    return ray


def _first_line(error):
    return str(error).strip().partition("\n")[0]


def _check_answers(address):
    """Raise ConnectionError unless something answers at "host:port" or "ray://host:port"."""
    if address == "auto":  # Ray looks for a cluster on this machine
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    advice = "start the cluster, correct RAY_ADDRESS, or unset it to work on this machine"
    if not host or "/" in host or not port.isdigit():
        raise ConnectionError(
            f"RAY_ADDRESS is {address!r}, which is neither 'host:port' nor 'ray://host:port'; {advice}"
        )
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"no Ray cluster answers at RAY_ADDRESS {address!r} ({error}); {advice}"
        ) from None


def _room():
    """Return the bytes for the object store: `STORE`, or what is free of the shared memory."""
    if not SHARED.is_dir():  # not Linux: Ray takes the temporary folder
        return STORE
    free = shutil.disk_usage(SHARED).free
    if free < LEAST:
        raise RuntimeError(
            f"{SHARED} has {free / 2**20:.0f} MiB free and Ray needs {LEAST / 2**20:.0f}; delete what lies "
            "there, or give the container more (docker run --shm-size=1g)"
        )
    return max(LEAST, min(STORE, int(0.9 * free)))
