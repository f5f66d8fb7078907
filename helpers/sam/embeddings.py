"""The disk cache of image embeddings: the encoder runs once per image, however often it is asked.

Each embedding is one file, float16 and memory-mapped, at `embeddings/<encoder>/<image>.safetensors` in the
cache. <encoder> is a hash of the encoder's weights, preprocessing and precision, <image> one of the
pixels, so nothing can be out of date, and a fine-tuned decoder reads the released one's embeddings.
"""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from helpers import augment, cache, data
from helpers.sam import networks, openvino


@dataclasses.dataclass(frozen=True)
class StoredEmbedding:
    """A `helpers.sam.Embedding` on disk; each look at `features` maps the file anew."""

    path: Path
    image_size: tuple  # (H, W) of the image, pixels
    resized: tuple  # (h, w) of the image inside the network's input, pixels
    seconds: float  # what the encoder took for it, when it was made

    @property
    def features(self) -> torch.Tensor | tuple:
        """As `helpers.sam.Embedding` has them, float16 on the CPU, in memory only while they are used."""
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            found = tuple(file.get_tensor(name) for name in sorted(file.keys()))
        return found if len(found) > 1 else found[0]


def embed_rows(
    segmenter,
    rows: pd.DataFrame,
    folder: str | Path = "",
    augmentation: int = 0,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, StoredEmbedding]:
    """Embed the images of an index; what lies in the cache is not embedded again.

    A damaged file is made anew, a stopped call is resumed, and several processes may fill one folder ("" is
    `helpers.cache.folder()`). Raises OSError where it can't be written to. `augmentation` and `seed` are as
    for `helpers.augment.augment`; augmentation 0 is the image itself.

    Returns:
        dict from image_id to StoredEmbedding, in the order of `rows`.
    """
    target = cache.folder(folder) / "embeddings" / encoder_hash(segmenter)
    found, missing, damaged = {}, [], 0
    # On a GPU several batches at once, so that `embed` can prepare one while the encoder runs.
    at_once = segmenter.batch_size * (1 if segmenter.device.type == "cpu" else 4)
    progress = tqdm(rows.itertuples(), "embedding", len(rows), unit="image", file=sys.stdout, disable=quiet)

    def make():
        names, paths, images = zip(*missing)
        for name, path, embedding in zip(names, paths, segmenter.embed(images)):
            _write(path, embedding)
            found[name] = _read(path)
        missing.clear()

    for row in progress:
        image = data.read_image(row.image_path)
        image, _ = augment.augment(image, None, augmentation, row.image_id, seed)
        digest = hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()
        path = target / f"{digest[:32]}.safetensors"
        found[row.image_id] = _read(path)
        if not found[row.image_id]:
            damaged += path.exists()
            missing.append((row.image_id, path, image))
        if len(missing) == at_once:
            make()
    if missing:
        make()
    if damaged:
        print(f"{damaged} cached embeddings were cut off or not ours, and have been made anew")
    return found


def encoder_hash(segmenter) -> str:
    """Return a hash of all that an embedding depends on besides the image."""
    how = segmenter.precision + " by OpenVINO" * openvino.serves(segmenter)
    settings = dataclasses.asdict(segmenter.preprocessing) | {"title": "", "of": how}
    model = segmenter.model  # a part of SAM 2's decoder, too, makes the embedding
    made_by = model.vision_encoder if segmenter.model_type == "sam" else model
    return cache.key(settings, networks.state_hash(made_by))


def _read(path):
    """Return the StoredEmbedding of a whole file of ours, else None."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            found = [file.get_slice(name) for name in sorted(file.keys())]
            right = {one.get_dtype() for one in found} == {"F16"} and found[0].get_shape() == about["shape"]
        if right and about["image"] == path.stem:
            sizes = tuple(about["image_size"]), tuple(about["resized"])
            return StoredEmbedding(path, *sizes, about["seconds"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        pass  # not there, cut off, or not ours: it is made anew
    return None


def _write(path, embedding):
    from safetensors.torch import save

    found = embedding.features if isinstance(embedding.features, tuple) else (embedding.features,)
    half = {f"features{k or ''}": one.to("cpu", torch.float16).contiguous() for k, one in enumerate(found)}
    about = {"image": path.stem, "shape": list(found[0].shape), "image_size": embedding.image_size}
    about |= {"resized": embedding.resized, "seconds": round(embedding.seconds, 4)}
    cache.write(path, save(half, {"about": json.dumps(about)}))
