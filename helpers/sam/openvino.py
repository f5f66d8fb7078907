"""LiteMedSAM's image encoder on a CPU through OpenVINO: the same network, in about half the time.

It is taken where openvino, onnx and onnxscript are installed; where one is not, torch encodes.
"""

import contextlib
import importlib.util
from collections.abc import Callable

import numpy as np
import torch

from helpers import cache
from helpers.sam import networks


def serves(segmenter) -> bool:
    """Whether OpenVINO runs a segmenter's encoder: LiteMedSAM's, on a CPU, with all of it installed."""
    tiny_vit = isinstance(segmenter.model.vision_encoder, networks.TinyViTEncoder)
    needed = ("openvino", "onnx", "onnxscript")
    return tiny_vit and segmenter.device.type == "cpu" and all(map(importlib.util.find_spec, needed))


def compiled(segmenter) -> Callable:
    """Return a function from pixels (N, 3, size, size) to features, float32, in the segmenter's precision.

    Where the processor has no bfloat16, OpenVINO stays in float32.
    The network is converted once, into a file of `helpers.cache.folder()`, where that can be written to.
    """
    import openvino

    side, encoder = segmenter.preprocessing.input_size, segmenter.model.vision_encoder.tiny_vit
    name = f"{cache.key(torch.__version__, networks.state_hash(encoder))}.onnx"
    path, core = cache.folder() / "openvino" / name, openvino.Core()
    if path.is_file():
        network = path.read_bytes()
    else:
        program = torch.onnx.export(encoder, (torch.zeros(1, 3, side, side),), dynamo=True, verbose=False)
        network = program.model_proto.SerializeToString()
        with contextlib.suppress(OSError):  # then it is converted again next time
            cache.write(path, network)
    precision = "bf16" if segmenter.precision == "bfloat16" else "f32"
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    run = core.compile_model(core.read_model(network), "CPU", settings | {"PERFORMANCE_HINT": "LATENCY"})
    return lambda pixels: torch.from_numpy(np.concatenate([run(one[None])[0] for one in pixels.numpy()]))
