"""SAM, MedSAM and LiteMedSAM behind one class: load, embed, predict, fine-tune, save.

SAM: A. Kirillov et al., "Segment Anything", ICCV 2023. MedSAM and LiteMedSAM: J. Ma et al., "Segment anything
in medical images", Nature Communications 15 (2024) 654. The training data of MedSAM and LiteMedSAM very
probably contain BUSI, so their rows say "released weights". SAM-HQ, SAM 2, EdgeTAM and SAM 3 only predict.
"""

from helpers.sam.preprocess import PREPROCESSING, Preprocessing, enlarge, preprocess, scale_box
from helpers.sam.segmenter import Embedding, Segmenter, check_image, default_checkpoint, launch, load

__all__ = ["PREPROCESSING", "Embedding", "Preprocessing", "Segmenter", "check_image", "default_checkpoint"]
__all__ += ["enlarge", "launch", "load", "preprocess", "scale_box"]
