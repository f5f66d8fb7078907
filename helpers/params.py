"""Settings: of notebooks, which the environment can override, and of configs, which have limits."""

import dataclasses
import difflib
import os

PREFIX = "NB_"
PROFILES = ("test", "quick", "full")

# Every setting of every notebook. Jupyter's images (Binder, Pangeo, Kubeflow) set NB_ variables of their own.
SETTINGS = {
    "PROFILE": "which values the settings have: 'test', 'quick' or 'full'",
    "DATA": "which images: 'auto' (BUSI, else synthetic images), 'busi' or 'synthetic'",
    "SYNTHETIC_IMAGES": "images per class of the synthetic set",
    "TRAIN_IMAGES": "training images of what learns from embeddings, spread over the set; 0 means all",
    "LIMIT": "validate on and score at most this many held-out images, spread over the fold; 0 means all",
    "FOLD": "which of the five folds is the test fold, 0 to 4",
    "SEED": "seed of everything random",
    "CHECKPOINT": "weights: 'lite-medsam', a Hub id, a local folder or 'tiny'",
    "PRECISION": "what the image encoder and fine-tuning multiply in: 'float32', 'bfloat16', 'auto'",
    "SAM_EPOCHS": "passes of the mask decoder over the training images",
    "LEARNING_RATE": "of fine-tuning, at the start",
    "AUGMENTATIONS": "augmented copies of each training image that the mask decoder sees",
    "UNET_WIDTH": "filters of the U-Net's first level",
    "UNET_SIZE": "pixels: the U-Net sees size x size",
    "UNET_EPOCHS": "passes of the U-Net over the training images",
    "PRETRAIN_IMAGES": "synthetic images per class that a network is pretrained on",
    "VGG_WEIGHTS": "what VGG-16 starts from: 'imagenet', a file of its convolutions, or 'scratch'",
    "VGG_IMAGES": "training images of VGG-16, spread over the set; 0 means all",
    "VGG_SIZE": "pixels: VGG-16 sees size x size",
    "VGG_EPOCHS": "passes of VGG-16 over the training images",
    "PIPELINE": "folder of an automatic pipeline; empty means the one in the package",
    "IMAGE": "an image of your own: PNG, JPEG or DICOM",
    "FRAME": "which frame of that image, where it has several, from 0",
    "FACTORS": "hyper-parameters of each model that are varied one at a time; 0 means all",
    "SEEDS": "how many seeds each value is run with",
    "TRIALS": "settings that each search tries",
    "TRIAL_IMAGES": "training images of a trial of the mask decoder",
    "TRIAL_EPOCHS": "passes of U-Net and VGG-16 over the training images in a trial",
    "DEGRADED": "held-out images; those with a lesion are shown as other scanners would",
    "PROCESSES": "GPUs that share the fine-tuning",
    "CACHE": "folder for image embeddings and fine-tuned weights; empty means ~/.cache",
    "DRAW": "show the widget to draw a box on; no where nobody is there to draw",
    "RESULTS": "folder for result files; empty means the repository's results/",
}


def profile() -> str:
    """Return `$NB_PROFILE`, else "full" where there is a GPU, else "quick"; ValueError for an unknown one."""
    chosen = os.environ.get(PREFIX + "PROFILE")
    if not chosen:
        from helpers.devices import default_device

        return "quick" if default_device() == "cpu" else "full"
    if chosen not in PROFILES:
        raise ValueError(f"{PREFIX}PROFILE={chosen!r} is none of {', '.join(PROFILES)}")
    return chosen


def param(name, full, quick=None, test=None):
    """Return the setting `name`: `$NB_<name>` in the type of `full` (bool, int, float or str), else its value
    in the `profile` of this run. `quick` is `full`, and `test` is `quick`, where it is not given.

    A text that begins with "~" is a path in the home folder.

    Raises:
        KeyError: `name` is not in `SETTINGS`.
        ValueError: an `NB_` variable is almost a setting's, or its text does not fit the type.
    """
    if name not in SETTINGS:
        raise KeyError(f"unknown setting {name!r}{_suggest(name)}; add it to helpers.params.SETTINGS")
    for variable in os.environ:
        if not variable.startswith(PREFIX):
            continue
        setting = variable.removeprefix(PREFIX)
        if setting not in SETTINGS and (meant := _suggest(setting, PREFIX)):
            raise ValueError(
                f"the environment sets {variable}, which no notebook reads{meant}; unset it, or use one of "
                + ", ".join(PREFIX + known for known in SETTINGS)
            )
    text = os.environ.get(PREFIX + name)
    if text is None:
        quick = full if quick is None else quick
        return {"full": full, "quick": quick, "test": quick if test is None else test}[profile()]
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    try:
        if isinstance(full, str):
            return os.path.expanduser(text)
        return words[text.lower()] if isinstance(full, bool) else type(full)(text)
    except (KeyError, ValueError):
        raise ValueError(
            f"{PREFIX}{name}={text!r} is not of type {type(full).__name__}; "
            f"{SETTINGS[name]} (default {full!r})"
        ) from None


def common():
    """Return the six settings of every notebook: DATA, FOLD, SEED, PROFILE, CACHE, RESULTS."""
    chosen = param("DATA", "auto", test="synthetic"), param("FOLD", 0), param("SEED", 0)
    return *chosen, profile(), param("CACHE", ""), param("RESULTS", "")


def _suggest(name, prefix=""):
    close = difflib.get_close_matches(name.upper(), SETTINGS, n=1, cutoff=0.75)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def limited(default, *, options=None, at_least=None, above=None, below=None, multiple_of=None):
    """Return a dataclass field with limits, which `check` holds its value to.

    Args:
        default: of the field. A tuple's values are checked one by one, None is always allowed.
        options: the only values allowed.
        at_least, above, below: numbers that bound the value.
        multiple_of: a whole number that divides the value.
    """
    limits = {"options": options, "at_least": at_least, "above": above, "below": below}
    return dataclasses.field(default=default, metadata=limits | {"multiple_of": multiple_of})


def check(config):
    """Hold a dataclass to the limits of its `limited` fields: for `__post_init__`.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if one is not None and field.metadata:
                _hold(field.name, one, **field.metadata)


def _hold(name, value, options, at_least, above, below, multiple_of):
    if options is not None:
        if value not in options:
            raise ValueError(f"{name} {value!r} is none of {', '.join(map(str, options))}")
        return
    rules = [
        (at_least, at_least is None or value >= at_least, f"{at_least} or more"),
        (above, above is None or value > above, f"above {above}"),
        (below, below is None or value < below, f"below {below}"),
        (multiple_of, not multiple_of or value % multiple_of == 0, f"a multiple of {multiple_of}"),
    ]
    if not all(held for _, held, _ in rules):
        allowed = ", and ".join(text for limit, _, text in rules if limit is not None)
        raise ValueError(f"{name} is {value}; it must be {allowed}")


SCHEDULES = ("constant", "linear", "cosine", "one cycle")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What every training in torch has; a subclass adds fields and defaults of its own (`limited` again)."""

    epochs: int = limited(20, at_least=1)  # passes over the training images
    learning_rate: float = limited(1e-3, above=0)  # at the start; with "one cycle" at the peak
    weight_decay: float = limited(0.0, at_least=0)
    batch_size: int = limited(8, at_least=1)  # images per step, over all processes; batches differ by one
    optimizer: str = limited("adamw", options=("adam", "adamw", "sgd"))  # "sgd" has a momentum of 0.9
    # of the learning rate, by steps: "linear" and "cosine" go down to 0, "one cycle" up over the first
    # fifth, then down (L. Smith, 2018)
    schedule: str = limited("constant", options=SCHEDULES)
    # decay of an exponential moving average of the weights, which is then validated and kept; 0 for none
    average: float = limited(0.0, at_least=0, below=1)
    max_grad_norm: float = limited(0.0, at_least=0)  # what gradients are cut to; 0 leaves them
    seed: int = 0  # of the order, and of what network and training set draw from torch's generator

    def __post_init__(self):
        check(self)
