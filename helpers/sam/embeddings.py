"""The disk cache of image embeddings: the encoder runs once per image, however often it is asked.

A frozen encoder gives the same embedding in every epoch, and takes most of the time. Each embedding is
one file, float16 and memory-mapped, at `<folder>/embeddings/<encoder>/<image>.safetensors`. <encoder>
is a hash of the encoder's weights, its preprocessing and its precision, <image> one of the pixels. So
nothing can be out of date: other weights or another view of an image are other files, and a
fine-tuned decoder reads those of the released one. The folder may be deleted at any time.
"""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from helpers import augment, cache, data


@dataclasses.dataclass(frozen=True)
class StoredEmbedding:
    """A `helpers.sam.Embedding` on disk; each look at `features` maps the file anew.

    Attributes:
        path: of the file.
        image_size: (H, W) of the image, pixels.
        resized: (h, w) of the image inside the padded input, pixels.
        seconds: what the encoder took for it, when it was made.
    """

    path: Path
    image_size: tuple
    resized: tuple
    seconds: float

    @property
    def features(self):
        """Tensor (channels, h, w), float16 on the CPU, in memory only while it is used."""
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            return file.get_tensor("features")


def embed_rows(segmenter, rows, folder="", view=0, seed=0, quiet=False):
    """Embed the images of an index; what lies in the cache is not embedded again.

    A file that is cut off or not ours is made anew, an interrupted call goes on where it stopped, and
    several processes may fill one folder.

    Args:
        segmenter: helpers.sam.Segmenter.
        rows: rows of an index.
        folder: of the cache; "" is `helpers.cache.folder()`.
        view: which augmentation of each image, as for `helpers.augment.augment`; 0 is the image itself.
        seed: of the augmentation.
        quiet: show no progress.

    Returns:
        dict from image_id to StoredEmbedding, in the order of `rows`.

    Raises:
        OSError: the folder can't be written to.
    """
    target = cache.folder(folder) / "embeddings" / encoder_hash(segmenter)
    found, missing, damaged = {}, [], 0
    bar = {"desc": "embedding", "unit": "image", "file": sys.stdout, "disable": quiet}
    with tqdm(total=len(rows), **bar) as progress:
        for row in rows.itertuples():
            image = _image(row, view, seed)
            path = target / f"{_image_hash(image)}.safetensors"
            found[row.image_id] = _read(path)
            if found[row.image_id]:
                progress.update()
                continue
            damaged += path.exists()
            missing.append((row, path))
            if len(missing) == segmenter.batch_size:
                found |= _make(segmenter, missing, view, seed)
                progress.update(len(missing))
                missing = []
        found |= _make(segmenter, missing, view, seed)
        progress.update(len(missing))
    if damaged:
        print(f"{damaged} cached embeddings were cut off or not ours, and have been made anew")
    return found


def encoder_hash(segmenter):
    """Return a hash of all that an embedding hangs on besides the image."""
    digest = hashlib.sha256()
    settings = dataclasses.asdict(segmenter.preprocessing) | {"precision": segmenter.precision}
    settings.pop("title")
    digest.update(json.dumps(settings, sort_keys=True).encode())
    digest.update(state_hash(segmenter.network.get_submodule(segmenter.network.encoder)).encode())
    return digest.hexdigest()[:16]


def state_hash(module):
    """Return a hash of a torch module's weights."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _image(row, view, seed):
    image = data.read_image(row.image_path)
    return augment.augment(image, None, view, row.image_id, seed)[0] if view else image


def _image_hash(image):
    return hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()[:32]


def _read(path):
    """Return the StoredEmbedding of a whole file of ours, else None."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            features = file.get_slice("features")
            right = features.get_dtype() == "F16" and features.get_shape() == about["shape"]
        if right and about["image"] == path.stem:
            return StoredEmbedding(
                path, tuple(about["image_size"]), tuple(about["resized"]), about["seconds"]
            )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        pass  # not there, cut off, or not ours: it is made anew
    return None


def _make(segmenter, missing, view, seed):
    images = [_image(row, view, seed) for row, _ in missing]
    made = {}
    for (row, path), embedding in zip(missing, segmenter.embed(images)):
        _write(path, embedding)
        made[row.image_id] = _read(path)
    return made


def _write(path, embedding):
    from safetensors.torch import save

    features = embedding.features.to("cpu", torch.float16).contiguous()
    about = {
        "image": path.stem,
        "shape": list(features.shape),
        "image_size": embedding.image_size,
        "resized": embedding.resized,
        "seconds": round(embedding.seconds, 4),
    }
    cache.write(path, save({"features": features}, {"about": json.dumps(about)}))
