"""The mechanism behind the notebooks: lesions in breast-ultrasound images, segmented and classified.

Lessons use the core:

| module | what it holds |
| --- | --- |
| `params` | `param(...)`: a setting of a notebook, by profile; `NB_<NAME>` overrides it; limits of configs |
| `data` | find BUSI and BUS-BRA, index them, read ground truth, the grouped split |
| `devices` | what the hardware can do: bfloat16, memory |
| `images` | read an image or a mask in any common form |
| `dicom` | read a DICOM's frame as a viewer shows it |
| `synthetic` | simulated images in BUSI's own layout |
| `augment` | augmentation of an image with its mask: flip, rotation, zoom, gain |
| `prompts` | from a mask to a box, box jitter, the ellipse that never looks at the image |
| `sam` | SAM, MedSAM and LiteMedSAM behind one class: load, embed, predict, fine-tune, save |
| `unet` | a U-Net in Keras: build, train, predict |
| `vgg` | VGG-16: build, train, predict |
| `training` | what all trainings in torch share: config, resume, best epoch, history |
| `cache` | cache folder, atomic write, run key |
| `quiet` | hold back the start-up notes of libraries |
| `metrics` | segmentation and classification scores, a rule for every empty case, intervals |
| `results` | one JSON per model and run: written, read, selected by key |
| `tables` | what is made of them: tables of models side by side |
| `plots` | `overlay` and the other figures of the notebooks |

The wings are for later; the core never imports from them:

| wing | what it holds |
| --- | --- |
| `pipeline` | notebooks 07 and 08: `load()`, `.segment`, `.report`, and the command line |
| `pipeline.files` | find images in folders, choose their frames, say what makes one unfit |
| `pipeline.detector` | lesion boxes and class probabilities without a prompt |
| `pipeline.diagnosis` | from the predicted mask to calibrated probabilities and "uncertain" |
| `pipeline.train` | train a pipeline on the folds that are not the test fold |
| `pipeline.evaluate` | what a pipeline predicts for an index, and how that is scored |
| `pipeline.robustness` | an image as another scanner would show it |
| `scale` | notebooks 09 and 10; needs `requirements-scale.txt` |
| `scale.search` | hyper-parameters: many trainings with Ray Tune and Optuna |
| `scale.bulk` | a folder, a bucket or Parquet of images through a pipeline |
| `scale.ray_cluster` | start Ray on this machine, or join a cluster |

Importing `helpers` loads neither torch nor tensorflow; each module loads what it needs.
"""

import os

# Torch and MONAI import TensorFlow where it is installed; its start-up notes are no news to a reader.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# What Apple's GPUs cannot do yet, torch does on the CPU.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
