"""A pipeline as ONNX files, with model card and page: `python -m helpers.pipeline export --onnx FOLDER`."""

import collections
import dataclasses
import functools
import importlib.util
import json
import shutil
import string
from pathlib import Path

import torch

from helpers import cache, pipeline
from helpers.pipeline import detector, diagnosis

TEMPLATES = Path(__file__).parent / "exported"


@torch.no_grad()
def to_onnx(folder: str | Path, weights: str | Path | None = None) -> None:
    """Write networks and classifier in float32, for any number of images, `pipeline.json`, card and page.

    Args:
        folder: to write; it appears whole or not at all, and replaces that of an earlier export.
        weights: folder of a pipeline, as for `helpers.pipeline.load`, whose further errors are raised.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        FileExistsError: the folder holds something else.
        OSError: it can't be written.
        ValueError: the pipeline's segmenter is neither SAM's nor MedSAM's.
    """
    for needed in ("onnx", "onnxscript"):
        if importlib.util.find_spec(needed) is None:
            raise ImportError(f"the export needs {needed}; say `pip install onnx onnxscript onnxruntime`")
    folder, weights = Path(folder).expanduser(), Path(weights or pipeline.WEIGHTS).expanduser()
    if folder.exists() and not (folder / "detector.onnx").is_file():
        raise FileExistsError(f"{str(folder)!r} is no earlier export; choose another folder")
    pipe = pipeline.load(weights, "cpu", "float32")
    pipe.segmenter.check_family("exported")
    segmenter, detectors = pipe.segmenter, [one.cpu() for one in pipe.detectors]
    size, side, cell = detectors[0].shape["size"], segmenter.preprocessing.input_size, detector.COARSE
    pixels, seen = torch.zeros(2, 1, size, size, dtype=torch.uint8), torch.zeros(2, 3, side, side)
    embedding, box = segmenter.encode(seen), torch.tensor([[0.0, 0.0, side / 2, side / 2]] * 2)
    features = torch.zeros(2, len(diagnosis.FEATURES) + 2 * embedding.shape[1])
    ask, classify = functools.partial(detector.ask, detectors), _classifier(pipe.classifier, features)
    model = [segmenter.model]
    about = {"size": size, "cell": cell, "percentile": detector.PERCENTILE, "map": size // cell}
    about |= {"channels": embedding.shape[1], "cells": embedding.shape[2], "grid": segmenter.grid}
    about |= {"features": features.shape[1]} | dataclasses.asdict(segmenter.preprocessing)
    settings, card = pipe.settings() | {"onnx": about}, weights / "README.md"
    known = collections.defaultdict(lambda: "unknown", settings | pipe.card | about)
    known |= {"segmenter": segmenter.title, "card": card.read_text("utf-8") if card.is_file() else "None."}
    with cache.atomic(folder) as new:
        shutil.copytree(TEMPLATES, new)
        _write(new / "detector.onnx", ask, detectors, {"pixels": pixels}, "lesion_map", "answers")
        _write(new / "encoder.onnx", segmenter.encode, model, {"pixels": seen}, "embedding")
        _write(new / "decoder.onnx", segmenter.decode, model, {"embedding": embedding, "box": box}, "logits")
        _write(new / "classifier.onnx", classify, [], {"features": features}, "probabilities")
        (new / pipeline.SETTINGS).write_text(f"{json.dumps(settings, indent=1)}\n", "utf-8")
        text = string.Template((new / "README.md").read_text("utf-8")).substitute(known)
        (new / "README.md").write_text(text, "utf-8")


def _classifier(diagnosed, features):
    """Return `Diagnosis.predict` in torch; as one product, for ONNX Runtime 1.32 mixes up picked columns."""
    weights, parts = torch.zeros(features.shape[1], 2), (diagnosed.presence, diagnosed.malignancy)
    for k, (part, chosen) in enumerate(zip(parts, (diagnosis.PRESENCE, diagnosis.MALIGNANCY))):
        weights[diagnosis._columns(features, chosen), k] = torch.tensor(part.weights).float()
    biases = torch.tensor([part.bias for part in parts])

    def classify(features):
        present, malignant = torch.sigmoid(features @ weights + biases).unbind(1)
        return torch.stack([1 - present, present * (1 - malignant), present * malignant], 1)

    return classify


def _write(path, function, parts, inputs, *outputs):
    """Export a function of tensors, with the modules whose weights it uses."""
    network = torch.nn.Module()
    network.parts, network.forward = torch.nn.ModuleList(parts), function
    shapes = ({0: "N"}, {0: torch.export.Dim.DYNAMIC})[: len(inputs)]
    how = {"input_names": list(inputs), "output_names": outputs, "dynamic_shapes": shapes}
    program = torch.onnx.export(network.eval(), tuple(inputs.values()), dynamo=True, verbose=False, **how)
    for node in program.model.graph:
        node.metadata_props.clear()  # the paths of this machine among them
    program.save(path, external_data=False)
