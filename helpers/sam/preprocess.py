"""What a checkpoint expects of an image and of a box, and the way back from logits to the image's size."""

import dataclasses
import functools
from collections.abc import Sequence

import cv2
import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a checkpoint family expects of its input.

    The image's longest side becomes `input_size` pixels, intensities are scaled, and zeros fill the square
    at the right and at the bottom. Logits go the same way back: enlarged to `input_size`, the padding cut
    off, resized bilinearly to the image's own size. "stretch" and "square" resize both sides without padding.
    """

    title: str  # the model's name in a result row
    input_size: int  # pixels
    # "area" (cv2.INTER_AREA), "bilinear" (with antialiasing), "stretch" (bicubic), or "square" (bilinear)
    resample: str
    # "min-max" of the resized image, "mean-std" of ImageNet, "half" (from -1 to 1), or "unit" (x / 255)
    intensity: str


PREPROCESSING = {
    "lite-medsam": Preprocessing("LiteMedSAM", 256, "area", "min-max"),
    "facebook/sam-vit-base": Preprocessing("SAM ViT-B", 1024, "bilinear", "mean-std"),
    "facebook/sam-vit-large": Preprocessing("SAM ViT-L", 1024, "bilinear", "mean-std"),
    "facebook/sam-vit-huge": Preprocessing("SAM ViT-H", 1024, "bilinear", "mean-std"),
    "wanglab/medsam-vit-base": Preprocessing("MedSAM ViT-B", 1024, "bilinear", "mean-std"),
    "flaviagiammarino/medsam-vit-base": Preprocessing("MedSAM ViT-B (x/255)", 1024, "bilinear", "unit"),
    "tiny": Preprocessing("tiny SAM, random weights", 128, "bilinear", "mean-std"),
}


@functools.cache
def processor(preprocessing: Preprocessing, grid: int = 256):
    """Return the transformers processor (SamProcessor, Sam2Processor) that does what a preprocessing says.

    `grid` is the side of the network's logits in pixels; `labels` of `segmentation_maps` have it too.
    """
    import transformers as hf

    stretch, size = preprocessing.resample == "stretch", preprocessing.input_size
    if preprocessing.resample == "square":  # SAM 2 and later
        kind = hf.Sam3ImageProcessor if preprocessing.intensity == "half" else hf.Sam2ImageProcessor
        sizes = {"size": {"height": size, "width": size}, "mask_size": {"height": grid, "width": grid}}
        return hf.Sam2Processor(kind(**sizes, do_normalize=preprocessing.intensity != "unit"))

    class MinMaxProcessor(hf.SamImageProcessor):
        """An image is resized as uint8; then its own minimum and maximum become 0 and 1.

        bowang-lab/MedSAM: CVPR24_LiteMedSAM_infer.py and, where both sides stretch, MedSAM_Inference.py.
        """

        def _get_preprocess_shape(self, old_shape, longest_edge):
            square = (longest_edge, longest_edge)
            return square if stretch else super()._get_preprocess_shape(old_shape, longest_edge)

        def resize(self, image, size, resample=None, **settings):
            if image.shape[1] == 1:  # a mask
                return super().resize(image, size, resample, **settings)
            shape = self._get_preprocess_shape(image.shape[-2:], size.longest_edge)
            pictures = [_resize(one.permute(1, 2, 0).numpy(), shape, stretch) for one in image]
            return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

        def rescale_and_normalize(self, images, do_rescale, *settings):
            if not do_rescale:  # a mask
                return images
            images = images.float()
            low, high = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
            return (images - low) / (high - low).clamp(min=1e-8)

    padded = grid if stretch else size  # what logits are enlarged to before padding is cut off
    kind = hf.SamImageProcessor if preprocessing.resample == "bilinear" else MinMaxProcessor
    return hf.SamProcessor(
        kind(
            size={"longest_edge": size},
            pad_size={"height": padded, "width": padded},
            mask_size={"longest_edge": grid},
            mask_pad_size={"height": grid, "width": grid},
            do_pad=not stretch,
            do_normalize=preprocessing.intensity == "mean-std",
        )
    )


def _resize(image, shape, stretch):
    if not stretch:
        return cv2.resize(image, shape[::-1], interpolation=cv2.INTER_AREA)
    from skimage.transform import resize

    return resize(image, shape, order=3, preserve_range=True, anti_aliasing=True).astype(np.uint8)


def preprocess(images: Sequence, preprocessing: Preprocessing) -> tuple[torch.Tensor, list[tuple]]:
    """Turn images, uint8 (H, W, 3) RGB, into a network's input.

    Returns:
        float32 tensor (N, 3, input_size, input_size), and the (h, w) that each image fills of it.

    Raises:
        ValueError: an image so narrow that its short side would shrink to nothing.
    """
    for image in images:
        if min(image.shape[:2]) * preprocessing.input_size < max(image.shape[:2]):
            raise ValueError(
                f"an image of {image.shape[1]} x {image.shape[0]} pixels is too narrow: at "
                f"{preprocessing.input_size} pixels its short side would vanish; crop its long side"
            )
    image_processor = processor(preprocessing).image_processor
    batch = image_processor(images, return_tensors="pt", input_data_format="channels_last")
    square = torch.full((len(images), 2), preprocessing.input_size)
    return batch["pixel_values"], [tuple(size) for size in batch.get("reshaped_input_sizes", square).tolist()]


def scale_box(box, image_size: tuple, resized: tuple) -> torch.Tensor:
    """Return a box (4,) in pixels of an image of size (H, W) in those of the network's input, float32.

    `resized` is the (h, w) that the image fills of the network's input.
    """
    scale = [resized[1] / image_size[1], resized[0] / image_size[0]] * 2
    return torch.as_tensor(np.asarray(box, dtype=np.float64) * scale, dtype=torch.float32)


def enlarge(
    logits: torch.Tensor, image_size: tuple, resized: tuple, preprocessing: Preprocessing
) -> torch.Tensor:
    """Bring low-resolution logits (N, 1, h, w) to the image's own size (N, 1, H, W).

    They are enlarged, the padding is cut off behind `resized`, the (h, w) that the image fills of the
    network's input, and what is left is resized to `image_size` (H, W).
    """
    back = processor(preprocessing, logits.shape[-1]).post_process_masks
    return back([logits], [image_size], reshaped_input_sizes=[resized], binarize=False)[0]
