"""How fast LiteMedSAM's encoder is in each runtime on a CPU, and what that costs in Dice.

    BUSI_DIR=... python tests/benchmarks/encoders.py

Writes results/encoders.csv, or encoders_without_bfloat16.csv where the processor has no native bfloat16. One
image at a time, in rounds that time every runtime in turn: only ratios count. The Dice is that of the
validation lesions of fold 0 in their ground-truth boxes; int8 is calibrated on training images.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pandas as pd
import torch
import variants
from onnxruntime import quantization
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reference

from helpers import data, metrics, prompts, sam
from helpers.sam import openvino as ours

ROUNDS, CALIBRATION = 15, 64  # of timing; training images
ORDER = ("released package, float32", "torch, float32", "torch, bfloat16", "ONNX Runtime, float32")
ORDER += ("ONNX Runtime, int8", "OpenVINO, float32", "OpenVINO, bfloat16", "OpenVINO, int8")


def main():
    split = data.lesions(data.split(data.load_index()))
    val, train = data.scored(split, "val"), data.spread(split[split.subset == "train"], CALIBRATION)
    exact, fastest = (sam.load(device="cpu", precision=name) for name in ("float32", "auto"))
    released = reference.lite_medsam().image_encoder
    pixels, _ = sam.preprocess([data.read_image(path) for path in train.image_path], exact.preprocessing)
    encoders = {"released package, float32": released, "torch, float32": exact.encode}
    encoders["OpenVINO, float32"] = ours.compiled(exact)
    against, table = ["float32"], "encoders_without_bfloat16"
    if fastest.precision == "bfloat16":
        encoders |= {"torch, bfloat16": fastest.encode, "OpenVINO, bfloat16": ours.compiled(fastest)}
        against, table = ["float32", "bfloat16"], "encoders"
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        encoders |= exported(exact, pixels.numpy(), Path(folder))
        times = {name: [] for name in encoders}
        for one in tqdm(pixels[:ROUNDS].split(1), "timing"):
            for name, encode in encoders.items():
                start = time.perf_counter()
                encode(one)
                times[name].append(time.perf_counter() - start)
        lines = []
        for name, encode in encoders.items():
            seconds = np.array(times[name][1:])  # the first round warms up
            line = {"variant": name, "milliseconds": float(1000 * np.median(seconds))}
            for precision in against:
                ratios = np.array(times[f"torch, {precision}"][1:]) / seconds
                line[f"faster_than_{precision}"] = float(np.median(ratios))
            lines.append(line | {"dice": dice(exact, encode, val)})
            print(lines[-1], flush=True)
    for line in lines:
        variants.write(table, line, ORDER)


def exported(segmenter, calibration, folder):
    """Return the encoder in ONNX Runtime, in float32 and int8, and that of int8 in OpenVINO."""
    plain, prepared, integers = (folder / f"{name}.onnx" for name in ("plain", "prepared", "int8"))
    example = (torch.zeros(1, *calibration.shape[1:]),)
    torch.onnx.export(segmenter.model.vision_encoder.tiny_vit, example, dynamo=True, verbose=False).save(
        plain
    )
    quantization.shape_inference.quant_pre_process(plain, prepared, skip_symbolic_shape=True)
    [name] = (given.name for given in onnxruntime.InferenceSession(plain).get_inputs())

    class Images(quantization.CalibrationDataReader):
        images = iter(calibration)

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {name: image[None]}

    kinds = {"op_types_to_quantize": ["Conv", "MatMul", "Gemm"], "per_channel": True}
    quantization.quantize_static(prepared, integers, Images(), **kinds)
    options, found = onnxruntime.SessionOptions(), {}
    options.intra_op_num_threads = torch.get_num_threads()
    for path, precision in ((plain, "float32"), (integers, "int8")):
        session = onnxruntime.InferenceSession(path, options)
        found[f"ONNX Runtime, {precision}"] = lambda pixels, session=session: torch.from_numpy(
            session.run(None, {name: pixels.numpy()})[0]
        )
    network = openvino.Core().compile_model(
        integers, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    )
    found["OpenVINO, int8"] = lambda pixels: torch.from_numpy(network(pixels.numpy())[0].copy())
    return found


def dice(segmenter, encode, rows: pd.DataFrame):
    """Return the mean Dice of rows in their ground-truth boxes, from the embeddings of `encode`."""
    segmenter.__dict__["_by_openvino"] = encode  # what `embed` encodes with
    images = ((row.image_id, data.read_image(row.image_path)) for row in rows.itertuples())
    found = {name: segmenter.embed([image])[0] for name, image in images}
    masks = segmenter.predict_masks(found, prompts.truth_boxes(rows))
    return float(metrics.score(rows, masks, surface=False).dice.mean())


if __name__ == "__main__":
    main()
