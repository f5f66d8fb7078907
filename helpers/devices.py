"""What the hardware can do: bfloat16, and how much fits into its memory."""

import contextlib

import torch


def default_device() -> str:
    """Return the device to compute on: "cuda" where there is an NVIDIA GPU, "mps" on Apple's, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def fastest_precision(device: torch.device) -> str:
    """Return what a torch device multiplies fastest: "bfloat16" where native, "float16", or "float32"."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    cpu = torch.cpu
    native = device.type == "cpu" and (cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())
    return "bfloat16" if native else "float32"


@contextlib.contextmanager
def memory_advice(setting: str, value: int):
    """Name the setting to lower where the memory runs out: MemoryError."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        smaller = f"lower {setting} (now {value})" if value > 1 else "take a smaller checkpoint"
        raise MemoryError(f"out of memory: {smaller}, or take precision='bfloat16'") from error
