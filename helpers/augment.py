"""Augmentation of an image together with its mask: the only one of the torch models.

A frame is mirrored, rotated, zoomed and shifted, and shown as another scanner would: at another gain,
contrast and gamma, blurred, with more speckle. Masks and feature maps move with it, each at its own
resolution; the intensities of the pixels alone change.
"""

import dataclasses
import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Ranges:
    """How far each change goes at most; 0 leaves it out.

    Attributes:
        mirror: share of the images that are mirrored.
        rotate: degrees; a probe is tilted, never upside down, for shadows fall down.
        zoom: logarithm of the zoom; the height is zoomed by another half of it.
        aspect: logarithm of width over height.
        shift: share of the frame's sides.
        gain, contrast, gamma: logarithm of a factor of the intensity, of its distance from the mean, and
            of its exponent.
        depth: logarithm of the gain at the bottom, which is its inverse at the top.
        blur: standard deviation of a Gaussian, as a share of the shorter side.
        speckle: standard deviation of multiplicative noise.
    """

    mirror: float = 0.5
    rotate: float = 0.0
    zoom: float = 0.0
    aspect: float = 0.0
    shift: float = 0.0
    gain: float = 0.0
    contrast: float = 0.0
    gamma: float = 0.0
    depth: float = 0.0
    blur: float = 0.0
    speckle: float = 0.0


USUAL = Ranges(mirror=0, rotate=10, zoom=0.1, gain=0.2, contrast=0.2, blur=0.002, speckle=0.05)


def augment(
    image: np.ndarray, mask: np.ndarray | None, number: int, key: str, seed: int = 0, strength: float = 1.0
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return one of an image's augmentations, the same for the same arguments.

    Of the image, uint8 (H, W, 3) RGB, and its mask, bool (H, W) or None, `number` 0 are these themselves and
    1 their mirror image; from 2 on each changes within `USUAL` in its own way, drawn from `seed`, and odd
    ones are mirrored. `key` names the image, so that its augmentations do not depend on which others are
    seen. `strength` is a factor of the ranges; 0 mirrors only.
    """
    if number % 2:
        image = np.ascontiguousarray(image[:, ::-1])
        mask = None if mask is None else np.ascontiguousarray(mask[:, ::-1])
    if number < 2:
        return image, mask
    ranges = Ranges(*(strength * most for most in dataclasses.astuple(USUAL)))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {number} {key}".encode()))
    masks = [] if mask is None else [torch.from_numpy(mask)[None, None].float()]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    pixels, *masks = augment_batch(pixels, *masks, ranges=ranges, generator=generator)
    image = (pixels[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return image, masks[0][0, 0].numpy() > 0.5 if masks else None


def augment_batch(
    pixels: torch.Tensor, *maps: torch.Tensor, ranges: Ranges, generator=None
) -> list[torch.Tensor]:
    """Augment each image of a batch in its own way, and move its maps alike: 0 where no frame reaches.

    Args:
        pixels: float (N, C, H, W) from 0 to 1. A rotation is one in these pixels.
        maps: float (N, channels, height, width) of the same frames at any resolution: masks, features.
        generator: torch.Generator of the CPU, which all that is random comes from; None: torch's own.
    """
    count, _, height, width = pixels.shape

    def draw(largest, *shape):
        return (2 * torch.rand(count, *shape, generator=generator) - 1) * largest

    mirrored = 1 - 2 * (torch.rand(count, generator=generator) < ranges.mirror).float()
    turn, zoom = draw(math.radians(ranges.rotate)), draw(ranges.zoom)
    across, down = zoom.exp() * mirrored, (zoom + draw(ranges.zoom / 2)).exp()
    if ranges.aspect:
        wider = draw(ranges.aspect / 2).exp()
        across, down = across / wider, down * wider
    # From places in the result to places in the frame. Both run from -1 to 1 whatever the sides are,
    # so a rotation of the pixels needs the aspect.
    rows = [
        torch.stack([turn.cos() * across, -turn.sin() * down * height / width], 1),
        torch.stack([turn.sin() * across * width / height, turn.cos() * down], 1),
    ]
    move = torch.cat([torch.stack(rows, 1), 2 * draw(ranges.shift, 2, 1)], 2)
    parts = []
    for part in (pixels, *maps):
        grid = F.affine_grid(move, list(part.shape), align_corners=False)
        parts.append(F.grid_sample(part, grid, align_corners=False))
    gain, contrast, gamma = (
        draw(largest, 1, 1, 1).exp() for largest in (ranges.gain, ranges.contrast, ranges.gamma)
    )
    pixels = parts[0].clamp(min=1e-4) ** gamma * gain
    pixels = torch.lerp(pixels.mean((1, 2, 3), keepdim=True), pixels, contrast)
    if ranges.depth:
        pixels *= (draw(ranges.depth, 1, 1, 1) * torch.linspace(-1, 1, height)[:, None]).exp()
    if ranges.blur:
        from torchvision.transforms.functional import gaussian_blur

        largest = ranges.blur * min(height, width)
        size = 2 * [2 * math.ceil(3 * largest) + 1]
        drawn = (largest * torch.rand(count, generator=generator)).clamp(min=1e-3).tolist()
        pixels = torch.stack([gaussian_blur(one, size, [sd]) for one, sd in zip(pixels, drawn)])
    if ranges.speckle:
        amount = ranges.speckle * torch.rand(count, 1, 1, 1, generator=generator)
        pixels *= 1 + amount * torch.randn(count, 1, height, width, generator=generator)
    return [pixels.clamp(0, 1), *parts[1:]]
