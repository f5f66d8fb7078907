"""The mechanism behind the notebooks: breast-ultrasound lesions, outlined and named.

Where to look:

| module | what it holds |
| --- | --- |
| `params` | `param(name, default)`: a notebook setting, overridden by `NB_<NAME>` |
| `data` | find BUSI, index it, read images and masks, the grouped split |
| `synthetic` | a breast-ultrasound phantom in BUSI's own layout |
| `prompts` | from a mask to a box, box jitter, the ellipse that never looks at the image |
| `augment` | views of an image with its mask: mirrored, turned, scaled, at another gain |
| `sam` | SAM, MedSAM and LiteMedSAM behind one class: load, embed, predict, fine-tune, save |
| `embeddings` | the disk cache of image embeddings |
| `training` | what fine-tuning does: choices, the epoch loop, resuming |
| `unet` | a U-Net in Keras: build, train, predict |
| `vgg` | VGG-16: build, train, predict, explain |
| `heads` | a lesion map and the class from cached embeddings |
| `frames` | read any frame, PNG, JPEG or DICOM, and say what makes it unfit |
| `detector` | find the lesion without a box: a lesion map and the class from pixels and embedding |
| `diagnosis` | from the predicted outline to calibrated probabilities and "uncertain" |
| `pipeline` | the parts together: `load()`, `.segment`, `.report`, and the command line |
| `crossfit` | train a pipeline on the folds that are not the test fold |
| `findings` | what a pipeline finds on an index, and how that is judged |
| `degrade` | a frame as another scanner would show it |
| `outline` | what the outline alone gives away about the class |
| `metrics` | segmentation and classification scores, a rule for every empty case, intervals |
| `search` | hyper-parameters: many trainings with Ray Tune and Optuna, here or on a cluster |
| `bulk` | a folder, a bucket or Parquet of images through a pipeline, here or on a cluster |
| `cluster` | start Ray on this machine, or join a cluster |
| `results` | one JSON per model and run: written, read, selected |
| `tables` | what is made of them: the tables and the figure of README and notebook 06 |
| `plots` | every figure of the notebooks |
| `run` | `python -m helpers.run`: execute the notebooks, leave copies and a page |

Importing `helpers` loads neither torch nor tensorflow; each module loads what it needs.
"""

import os

# Torch and MONAI import TensorFlow where it is installed; its start-up notes are no news to a reader.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
