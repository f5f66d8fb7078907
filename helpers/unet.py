"""A U-Net in Keras: build, train, predict. It gets no prompt and finds the lesion by itself.

O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015. Runs on TensorFlow, and on torch with
KERAS_BACKEND=torch; the input pipeline is `tf.data` with both.
"""

import contextlib
import dataclasses
import math
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from helpers import cache, data
from helpers.devices import fastest_precision
from helpers.params import check, limited
from helpers.quiet import quiet_stderr

# TensorFlow brings an LLVM of its own, with which triton's, that torch may want later, crashes. So triton
# comes first and binds to its own symbols, in whichever order torch and TensorFlow come.
if hasattr(sys, "setdlopenflags"):  # Windows has none, and no triton
    _flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | getattr(os, "RTLD_DEEPBIND", 0))
    with contextlib.suppress(ImportError):  # no triton on this system, so no clash
        import triton  # noqa: F401
    sys.setdlopenflags(_flags)
torch.cuda.is_available()  # torch must ask the driver first: after TensorFlow it warns that it can't
with quiet_stderr():
    import keras
    import tensorflow as tf
    from keras import callbacks, layers, ops
    from tqdm.keras import TqdmCallback

    _GPUS = tf.config.list_physical_devices("GPU")
    for _gpu in _GPUS:
        if keras.backend.backend() == "tensorflow":
            tf.config.experimental.set_memory_growth(_gpu, True)  # leaves room for torch
        else:
            tf.config.set_visible_devices([], "GPU")

VERSION = 4  # raise it with every change that gives other numbers: older runs are then not resumed
# What did best on the validation images of fold 0 on two cores; notebook 04 shows it against the reference.
VALIDATED = {"loss": "dice+ce", "batch_norm": True, "augment": 1.0, "pretrain_images": 500}
VALIDATED |= {"learning_rate": 1e-3, "schedule": "cosine", "average": 0.99}
LEVELS = 4  # of pooling
# The last layer of each level has its name.
LEVEL_NAMES = [f"down_{k + 1}" for k in range(LEVELS)] + ["bottleneck"]
LEVEL_NAMES += [f"up_{k + 1}" for k in reversed(range(LEVELS))]
LAST = {"data_format": "channels_last"}  # said to each layer: keras.json may ask for the other
OPTIMIZERS = {"adamw": keras.optimizers.AdamW, "rmsprop": keras.optimizers.RMSprop}
OPTIMIZERS |= {"sgd": partial(keras.optimizers.SGD, momentum=0.9)}


def dice_and_cross_entropy(truth, logits):
    """Dice loss of the whole batch plus binary cross-entropy, of logits (N, H, W, 1)."""
    overlap = keras.losses.Dice()(truth, ops.sigmoid(logits))
    return overlap + keras.losses.BinaryCrossentropy(from_logits=True)(truth, logits)


def dice(truth, output, threshold=0.0):
    """Dice (N,) of outputs (N, H, W, 1) above a threshold; 1 where both masks are empty."""
    truth, lesion = ops.cast(truth, "float32"), ops.cast(output > threshold, "float32")
    size = ops.sum(truth, (1, 2, 3)) + ops.sum(lesion, (1, 2, 3))
    return ops.where(size > 0, 2 * ops.sum(truth * lesion, (1, 2, 3)) / ops.maximum(size, 1), 1.0)


LOSSES = {"mse": "mean_squared_error", "dice+ce": dice_and_cross_entropy}


@dataclasses.dataclass(frozen=True)
class Config:
    """What a U-Net and its training depend on besides the data. The defaults are the reference."""

    # pixels: images are stretched to size x size, and pooled four times, which doubles the filters
    size: int = limited(128, at_least=2**LEVELS, multiple_of=2**LEVELS)
    width: int = limited(64, at_least=1)  # filters of the first level
    activation: str = limited("relu", options=("relu", "gelu", "silu", "leaky_relu"))
    batch_norm: bool = False  # after each convolution
    dropout: tuple = limited((0.2, 0.1), at_least=0, below=1)  # shares, going down and going up
    # "mse" of a ReLU head, or batch Dice of the sigmoid plus binary cross-entropy of logits
    loss: str = limited("mse", options=tuple(LOSSES))
    # strength of flip, rotation, zoom, shift, contrast, brightness and gamma: 1 is usual, 0 none
    augment: float = limited(0.0, at_least=0, below=4)
    # synthetic images per class (`helpers.data.pretraining_set`) to train on first, in a run of its own
    pretrain_images: int = limited(0, at_least=0)
    pretrain_epochs: int = limited(8, at_least=1)
    epochs: int = limited(50, at_least=1)  # passes over the training images
    batch_size: int = limited(8, at_least=1)  # images per step
    optimizer: str = limited("adamw", options=tuple(OPTIMIZERS))
    learning_rate: float = limited(1e-4, above=0)  # at the start; with the loss "mse" 1e-3 kills the ReLU
    weight_decay: float = limited(0.0, at_least=0)  # AdamW with 0 is Adam
    schedule: str = limited("constant", options=("constant", "cosine"))  # "cosine" goes down to 0
    # decay of an exponential moving average of the weights, which is then validated and kept; 0 for none
    average: float = limited(0.0, at_least=0, below=1)
    # what layers multiply in; "auto": bfloat16 where it is native, else float16 on a GPU, float32 on a CPU
    precision: str = limited("float32", options=("float32", "bfloat16", "float16", "auto"))
    seed: int = 0  # of the weights, the dropout, the order and the augmentation

    def __post_init__(self):
        object.__setattr__(self, "dropout", tuple(self.dropout))
        check(self)


def build(config: Config | None = None) -> keras.Model:
    """Build a U-Net with random weights; without a config the reference network.

    It leads from float (N, size, size, 1) in 0..1 to (N, size, size, 1): logits, or with the loss "mse" the
    output of a ReLU.
    """
    config = config or Config()
    keras.utils.set_random_seed(config.seed)
    plain = {"dtype": _policy(config.precision)}
    spatial = plain | LAST

    def convolve(x, filters, name=None):
        # Without batch normalisation, He's weights make outputs so large that the ReLU head soon dies.
        first = "he_normal" if config.batch_norm else "glorot_uniform"
        options = {"use_bias": not config.batch_norm, "kernel_initializer": first}
        x = layers.Conv2D(filters, 3, padding="same", **options, **spatial)(x)
        if config.batch_norm:
            x = layers.BatchNormalization(**plain)(x)
        return layers.Activation(config.activation, name=name, **plain)(x)

    def level(x, filters, dropout, name):
        x = convolve(x, filters)
        x = layers.Dropout(dropout, seed=config.seed + LEVEL_NAMES.index(name), **plain)(x)
        return convolve(x, filters, name)

    down, up = config.dropout
    image = x = keras.Input((config.size, config.size, 1), name="image")
    skips = []
    for k in range(LEVELS):
        x = level(x, config.width * 2**k, down, f"down_{k + 1}")
        skips.append(x)
        x = layers.MaxPooling2D(**spatial)(x)
    x = level(x, config.width * 2**LEVELS, down, "bottleneck")
    for k in reversed(range(LEVELS)):
        x = layers.Conv2DTranspose(config.width * 2**k, 2, strides=2, **spatial)(x)
        x = layers.Concatenate(**plain)([x, skips[k]])
        x = level(x, config.width * 2**k, up, f"up_{k + 1}")
    activation = "relu" if config.loss == "mse" else "linear"
    head = layers.Conv2D(1, 1, activation=activation, dtype="float32", name="head", **LAST)
    return keras.Model(image, head(x), name="unet")


def compile_network(network: keras.Model, config: Config, steps: int) -> None:
    """Give a network its optimiser, loss and metrics, for training over `steps` steps."""
    rate = config.learning_rate
    if config.schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, steps)
    average = {"use_ema": config.average > 0, "ema_momentum": config.average or 0.99}
    optimizer = OPTIMIZERS[config.optimizer](rate, weight_decay=config.weight_decay, **average)
    threshold, iou = (0.5, [MeanIoU(2, name="mean_iou")]) if config.loss == "mse" else (0.0, [])
    measures = [keras.metrics.MeanMetricWrapper(dice, "dice", threshold=threshold), *iou]
    network.compile(optimizer, LOSSES[config.loss], metrics=measures)
    network.optimizer.build(network.trainable_variables)  # now, or a step's graph is traced twice


class MeanIoU(keras.metrics.MeanIoU):
    """Keras' own, for outputs without a limit: 2 or more is no class, and TensorFlow 2.20 stops at one."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(y_true, keras.ops.minimum(y_pred, 1), sample_weight)


def device() -> str:
    """Return where networks run: "cuda" or "cpu"."""
    return "cuda" if _GPUS else "cpu"


def _policy(precision):
    precision = fastest_precision(torch.device(device())) if precision == "auto" else precision
    return precision if precision == "float32" else f"mixed_{precision}"


def pixels(rows: pd.DataFrame, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Read grey images and masks of 0 and 1 of index rows, both stretched to uint8 (N, size, size, 1)."""
    images = np.stack([_stretch(data.read_image(path), size) for path in rows.image_path])
    truths = (data.read_truth(row).astype(np.float32) for row in rows.itertuples())
    masks = [cv2.resize(truth, (size, size), interpolation=cv2.INTER_AREA) for truth in truths]
    return images[..., None], (np.stack(masks) >= 0.5).astype(np.uint8)[..., None]


def _stretch(image, size):
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (size, size), interpolation=cv2.INTER_AREA)


class _StepSeed(keras.random.SeedGenerator):
    """Seeds that depend on the run's seed and the step alone, where a layer's own count its calls."""

    def __init__(self, seed, step):  # without the variable that holds a count
        self.seed, self.step, self.drawn = tf.constant(seed, tf.int64), 16 * step, 0

    def next(self, ordered=True):
        self.drawn += 1
        return tf.stack([self.seed, self.step + self.drawn])


def _augmentation(strength):
    """Return Keras' layers that change each image of a batch its own way, and its mask alike."""
    common = LAST | {"dtype": "float32"}
    move, grey = common | {"fill_mode": "constant"}, common | {"value_range": (0, 1)}
    return [
        layers.RandomFlip("horizontal", **common),
        layers.RandomRotation(strength * 15 / 360, **move),
        layers.RandomZoom(strength * 0.25, strength * 0.25, **move),  # the aspect changes too
        # "nearest" shifts by whole pixels, which does not blur
        layers.RandomTranslation(strength * 0.1, strength * 0.1, interpolation="nearest", **move),
        layers.RandomContrast(min(strength * 0.3, 1.0), **grey),
        layers.RandomBrightness(strength * 0.1, **grey),
    ]


def batches(rows: pd.DataFrame, config: Config, done: int = 0) -> tf.data.Dataset:
    """Make the endless training stream of index rows, shuffled and augmented, after `done` steps.

    Its items are (images in 0..1, masks of 0 and 1), float32 (batch_size, size, size, 1).
    """
    images, masks = (tf.constant(array) for array in pixels(rows, config.size))
    augmentation = _augmentation(config.augment) if config.augment else []

    def shuffled(turn):  # not Dataset.shuffle, whose order is another one for each iterator
        seed = tf.stack([tf.constant(config.seed, tf.int64), turn])
        order = tf.random.experimental.stateless_shuffle(tf.range(len(rows)), seed)
        return tf.data.Dataset.from_tensor_slices(order)

    def take(step, which):
        x, y = tf.gather(images, which), tf.gather(masks, which)
        x, y = tf.cast(x, tf.float32) / 255, tf.cast(y, tf.float32)
        seed = _StepSeed(config.seed, step)
        for layer in augmentation:
            layer.backend.set_backend("tensorflow")  # that of tf.data, whatever Keras runs on
            drawn = layer.get_random_transformation(x, seed=seed)
            x, y = layer.transform_images(x, drawn), layer.transform_segmentation_masks(y, drawn)
        if augmentation:
            gamma = tf.random.stateless_uniform((len(which), 1, 1, 1), seed.next(), -0.4, 0.4)
            x **= tf.exp(config.augment * gamma)
        return x, y

    order = tf.data.Dataset.counter().flat_map(shuffled)
    steps = order.batch(config.batch_size, drop_remainder=True).enumerate().skip(done)
    return steps.map(take, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def fit(
    train: pd.DataFrame, val: pd.DataFrame, folder: str | Path = "", report=None, **config
) -> tuple[keras.Model, pd.DataFrame]:
    """Train a U-Net; it ends with the weights of the best epoch by mean Dice on `val`.

    A stopped run resumes after its last whole epoch; a finished one is read.

    Args:
        train: rows of an index; normal images take part with their empty mask.
        val: rows of an index to choose the epoch by; never the test fold. ValueError where groups lie in
            both.
        folder: for the runs; "" is `helpers.cache.folder()`. OSError where it can't be written to.
        report: as for `helpers.training.fit`.
        config: the fields of `Config`; ValueError where one is out of its limits.

    Returns:
        The network, and one row per epoch from 1: `epoch`, `loss`, `dice` (on the network's own grid, normal
        images included) and, with the loss "mse", Keras' `mean_iou`, each as `train_` (of augmented images)
        and `val_`; `seconds`, `best` (the epoch that is kept), `source`. FloatingPointError where the loss is
        no finite number.
    """
    config = Config(**config)
    data.check_apart(train, val)
    settings = dataclasses.asdict(config) | {"precision": _policy(config.precision)}
    parts = VERSION, keras.backend.backend(), settings, data.signature(train), data.signature(val)
    run = cache.run("unet", *parts, path=folder)
    if not run.finished:
        _train(train, val, config, run, folder, report)
    return load(run.folder / "unet.keras"), run.history().assign(source=train.source.iloc[0])


def _train(train, val, config, run, folder, report):
    """Train after the last state in the run's folder.

    Keras writes its backup in place, into the folder `writing`. When all of an epoch is on disk, that
    folder becomes `state-<epochs done>` in one step: a kill at any moment leaves a whole state.
    """
    steps, work = max(1, len(train) // config.batch_size), run.folder / "training"
    log, writing, best = work / "log.csv", work / "writing", work / "best-{epoch}.weights.h5"
    done = max((int(path.name.removeprefix("state-")) for path in work.glob("state-*")), default=0)
    network = build(config)
    if config.pretrain_images and not done:
        synthetic = data.pretraining_set(config.pretrain_images, folder)
        print(f"first {len(synthetic[0])} synthetic images, then the training images")
        first = dataclasses.asdict(config) | {"pretrain_images": 0, "epochs": config.pretrain_epochs}
        network.set_weights(fit(*synthetic, folder, **first)[0].get_weights())
    compile_network(network, config, config.epochs * steps)
    checkpoint = {"monitor": "val_dice", "mode": "max", "save_best_only": True}
    if done:
        backup = callbacks.BackupAndRestore(work / f"state-{done}")
        backup.set_model(network)
        backup.on_train_begin()
        for layer in network.layers:
            if isinstance(layer, layers.Dropout) and layer.rate:  # a backup does not hold its draws
                layer.seed_generator.state.assign([layer.seed, done * steps])
        cache.write(log, pd.read_csv(log, nrows=done).to_csv(index=False))  # it may be an epoch ahead
        checkpoint["initial_value_threshold"] = _history(log).val_dice.max()
    else:
        cache.write(log, "")
    shutil.rmtree(writing, ignore_errors=True)
    start = time.perf_counter()

    def end_epoch(epoch, logs):
        nonlocal start
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"the training loss of epoch {epoch + 1} is {logs['loss']}; lower learning_rate, or use "
                "precision='float32'"
            )
        now = time.perf_counter()
        logs["seconds"], start = round(now - start, 2), now

    def keep_epoch(epoch, logs):
        writing.rename(work / f"state-{epoch + 1}")
        shutil.rmtree(work / f"state-{epoch}", ignore_errors=True)
        history = _history(log)
        for number in history.epoch[~history.best]:
            (work / f"best-{number}.weights.h5").unlink(missing_ok=True)
        if report:
            report(history.to_dict("records"))

    logger = callbacks.CSVLogger(log, append=True)
    bar = TqdmCallback(config.epochs, verbose=0, tqdm_class=tqdm, desc="training", file=sys.stdout)
    images, masks = pixels(val, config.size)
    try:
        network.fit(
            batches(train, config, done * steps),
            validation_data=(images / np.float32(255), masks),
            validation_batch_size=config.batch_size,
            epochs=config.epochs,
            initial_epoch=done,
            steps_per_epoch=steps,
            callbacks=[
                callbacks.TerminateOnNaN(),
                *([callbacks.SwapEMAWeights()] if config.average else []),
                callbacks.LambdaCallback(on_epoch_end=end_epoch),
                logger,
                callbacks.ModelCheckpoint(best, save_weights_only=True, **checkpoint),
                callbacks.BackupAndRestore(writing, delete_checkpoint=False),
                bar,
                callbacks.LambdaCallback(on_epoch_end=keep_epoch),
            ],
            shuffle=False,  # the stream is shuffled
            verbose=0,
        )
    finally:  # also after an error
        logger.on_train_end()
        bar.on_train_end()
    history = _history(log)
    network.load_weights(work / f"best-{history.epoch[history.best].item()}.weights.h5")
    network.optimizer.finalize_variable_values(network.trainable_variables)  # the average
    plain = build(config)  # without the optimiser, which is twice the network's size
    plain.set_weights(network.get_weights())
    save(plain, run.folder / "unet.keras")
    run.finish(history)
    shutil.rmtree(work, ignore_errors=True)


def _history(log):
    table = pd.read_csv(log)
    table["epoch"] += 1  # Keras counts from 0
    table["best"] = table.index == table.val_dice.idxmax()
    return table.rename(columns={name: f"train_{name}" for name in ("loss", "dice", "mean_iou")})


def save(network: keras.Model, path: str | Path) -> None:
    """Write a network to a .keras file, which appears whole or not at all."""
    with cache.atomic(path) as scratch:
        network.save(scratch)


def load(path: str | Path) -> keras.Model:
    """Read a network that `save` or `fit` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no U-Net of `build`.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist; helpers.unet.fit and save write such files")
    try:
        network = keras.models.load_model(path, compile=False)
    except Exception as error:
        raise ValueError(f"{path} can't be read as a Keras network: {error}") from error
    shape = getattr(network, "input_shape", None)
    if network.name != "unet" or network.output_shape != shape or shape[1] != shape[2]:
        raise ValueError(
            f"{path} is the network {network.name!r} from {shape} to {network.output_shape}, no U-Net "
            "of helpers.unet.build"
        )
    return network


def predict(network: keras.Model, image: np.ndarray, mirror: bool = False) -> np.ndarray:
    """Return the probability of lesion, float32 (H, W), in an image, uint8 (H, W, 3) RGB.

    `mirror` averages the logits with those of the mirrored image. A ReLU's output is cut off at 1.
    """
    return _probabilities(network, [image], mirror)[0]


def predict_masks(network: keras.Model, rows: pd.DataFrame, mirror: bool = False) -> dict:
    """Return a dict from image_id to bool (H, W): `predict` above 0.5 for each row."""
    found = _probabilities(network, [data.read_image(path) for path in rows.image_path], mirror)
    return {name: probability > 0.5 for name, probability in zip(rows.image_id, found)}


def _probabilities(network, images, mirror):
    size = network.input_shape[1]
    batch = np.stack([_stretch(image, size) for image in images])[..., None] / np.float32(255)
    grids = network.predict(batch, 16, verbose=0)
    if mirror:
        grids = (grids + network.predict(batch[:, :, ::-1], 16, verbose=0)[:, :, ::-1]) / 2
    own = [cv2.resize(grid, image.shape[1::-1]) for grid, image in zip(grids, images)]
    if network.get_layer("head").activation is keras.activations.relu:
        return [np.clip(output, 0, 1) for output in own]
    return [1 / (1 + np.exp(-np.clip(logits, -80, 80))) for logits in own]
