"""Views of an image with its mask: mirrored, turned, scaled, and at another gain."""

import zlib

import numpy as np

MAX_TURN = 10  # degrees: a probe is tilted, never upside down, for shadows fall down
SCALE = 0.1  # share
BRIGHTNESS, CONTRAST = 0.2, 0.2  # shares: the gain and the dynamic range of another scanner


def augment(image, mask, number, key, seed=0, strength=1.0):
    """Return one of an image's views, the same for the same arguments.

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: bool (H, W), or None.
        number: 0 the image itself, 1 its mirror image; from 2 on also turned, scaled and at another
            gain, each its own way, and odd ones mirrored.
        key: names the image, so that its views do not hang on which others are seen.
        seed: of the views from 2 on.
        strength: of turn, scale and gain; 1 is usual, 0 mirrors only.

    Returns:
        (uint8 (H, W, 3), bool (H, W) or None).
    """
    if number % 2:
        image = np.ascontiguousarray(image[:, ::-1])
        mask = None if mask is None else np.ascontiguousarray(mask[:, ::-1])
    if number < 2:
        return image, mask

    import torch
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    change = v2.Compose(
        [
            v2.RandomAffine(
                MAX_TURN * strength,
                scale=[1 + SCALE * strength * side for side in (-1, 1)],
                interpolation=v2.InterpolationMode.BILINEAR,
            ),
            v2.ColorJitter(brightness=BRIGHTNESS * strength, contrast=CONTRAST * strength),
        ]
    )
    pixels = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))
    lesion = tv_tensors.Mask(torch.zeros(image.shape[:2]) if mask is None else torch.tensor(mask))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} {number} {key}".encode()))
        pixels, lesion = change(pixels, lesion)
    image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    return image, None if mask is None else lesion.numpy().astype(bool)
