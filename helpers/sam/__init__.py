"""SAM, MedSAM and LiteMedSAM behind one class: load, embed, predict, fine-tune, save.

SAM: A. Kirillov et al., "Segment Anything", ICCV 2023. MedSAM and LiteMedSAM: J. Ma et al.,
"Segment anything in medical images", Nature Communications 15 (2024) 654. The training data of
MedSAM and LiteMedSAM very probably contain BUSI, so their rows say "released weights".

`preprocess` is what an image goes through, `networks` reads checkpoints, `segmenter` holds `load` and
`Segmenter`; `embeddings` (the disk cache) and `finetune` are imported by name.
"""

from helpers.sam.preprocess import (
    PREPROCESSING,
    Preprocessing,
    enlarge,
    input_shape,
    preprocess,
    scale_box,
)
from helpers.sam.segmenter import (
    Embedding,
    Segmenter,
    check_image,
    default_checkpoint,
    load,
    memory_advice,
    multiplies_bfloat16,
)

__all__ = [
    "PREPROCESSING",
    "Embedding",
    "Preprocessing",
    "Segmenter",
    "check_image",
    "default_checkpoint",
    "enlarge",
    "input_shape",
    "load",
    "memory_advice",
    "multiplies_bfloat16",
    "preprocess",
    "scale_box",
]
