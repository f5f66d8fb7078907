"""The mechanism behind the notebooks: lesions in breast-ultrasound images, segmented and classified.

Lessons use the core. Settings: `params`. Images: `data`, `images`, `dicom`, `synthetic`, `augment`. Networks:
`sam` (SAM, MedSAM, LiteMedSAM) with `prompts`, `unet` (Keras), `vgg`, and what torch trainings share,
`training`. Scores: `metrics`, `results`, `tables`, `plots`. Below them: `cache`, `devices`, `quiet`.

Two wings are for later; the core never imports from them. `pipeline` (notebooks 07 and 08): from an image to
masks and diagnosis, in `files`, `geometry`, `detector`, `diagnosis`, `train`, `evaluate`, `external`,
`export`, `robustness`, `plot` and `cli`. `scale` (notebooks 09 and 10, `requirements-scale.txt`): `search`,
`bulk`, `ray_cluster`, `shards`, `task` and `plot`. Each module's first lines say what it holds.

Importing `helpers` loads neither torch nor tensorflow; each module loads what it needs.
"""

import os

# Torch and MONAI import TensorFlow where it is installed; its start-up notes are no news to a reader.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# What Apple's GPUs cannot do yet, torch does on the CPU.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
