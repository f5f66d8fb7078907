"""A U-Net in Keras: build, train, predict. It gets no prompt and finds the lesion by itself.

O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015. Runs on TensorFlow, and on torch with
KERAS_BACKEND=torch; the input pipeline is `tf.data` with both.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import tempfile
import time

import cv2
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from helpers import cache, data, synthetic


@contextlib.contextmanager
def _quiet():
    """Hold back what C++ writes to stderr: TensorFlow's start-up notes heed no setting of its own."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _import_triton():
    """Import what torch may want later: TensorFlow brings an LLVM of its own, and the two crash.

    So triton binds to its own symbols, in whichever order the two come.
    """
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | getattr(os, "RTLD_DEEPBIND", 0))
    try:
        import triton  # noqa: F401
    except ImportError:
        pass  # no triton on this system, so no clash
    finally:
        sys.setdlopenflags(flags)


_import_triton()
torch.cuda.is_available()  # torch must ask the driver first: after TensorFlow it warns that it can't
with _quiet():
    import keras
    import tensorflow as tf
    from keras import layers, ops

    _GPUS = tf.config.list_physical_devices("GPU")
    for _gpu in _GPUS:
        if keras.backend.backend() == "tensorflow":
            tf.config.experimental.set_memory_growth(_gpu, True)  # leaves room for torch
        else:
            tf.config.set_visible_devices([], "GPU")

VERSION = 1  # raise it with every change that gives other numbers: older runs are then not resumed
CPU_WIDTH = 16
LEVELS = 4  # of pooling, so that an image side must be a multiple of 16
ACTIVATIONS = ("relu", "gelu", "silu", "leaky_relu")
SCHEDULES = ("constant", "cosine")
OPTIMIZERS = {
    "adamw": keras.optimizers.AdamW,
    "rmsprop": keras.optimizers.RMSprop,
    "sgd": functools.partial(keras.optimizers.SGD, momentum=0.9),
}
# What did best on the validation images of fold 0 on two cores; notebook 04 shows it against the reference.
VALIDATED = {
    "loss": "dice+ce",
    "batch_norm": True,
    "augment": 1.0,
    "phantoms": 500,
    "schedule": "cosine",
    "average": 0.99,
}
LEVEL_NAMES = (
    *(f"down_{k + 1}" for k in range(LEVELS)),
    "bottleneck",
    *(f"up_{k + 1}" for k in reversed(range(LEVELS))),
)
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Config:
    """What a U-Net and its training hang on besides the data. The defaults are the reference recipe.

    Attributes:
        size: pixels; every image is stretched to size x size, and its mask back.
        width: filters of the first level; each of the four poolings doubles them.
        activation: "relu", "gelu", "silu" or "leaky_relu".
        batch_norm: normalise after each convolution.
        dropout: shares of features dropped going down and going up.
        loss: "mse", with a one-filter ReLU head, or "dice+ce": batch Dice of the sigmoid plus binary
            cross-entropy, with logits from the head.
        augment: strength of mirroring, turning, scaling, shifting and gain; 1 is usual, 0 is none.
        phantoms: synthetic images per class that it learns from first, in a run of its own
            (`helpers.synthetic.to_learn_from`); 0 is none.
        phantom_epochs: passes over them.
        epochs: passes over the training images.
        batch_size: images per step.
        optimizer: "adamw", "rmsprop" or "sgd" (momentum 0.9).
        learning_rate: of the optimiser, at the start.
        weight_decay: of the optimiser; AdamW with 0 is Adam.
        schedule: "constant", or "cosine" down to 0.
        average: decay of an exponential moving average of the weights, which is then what is
            validated and kept; 0 for none.
        precision: what the layers multiply in: "float32", "bfloat16", "float16" or "auto": bfloat16
            where it is native, else float16 on a GPU and float32 on a CPU.
        seed: of the weights, the order and the augmentation.
    """

    size: int = 128
    width: int = 64
    activation: str = "relu"
    batch_norm: bool = False
    dropout: tuple = (0.2, 0.1)
    loss: str = "mse"
    augment: float = 0.0
    phantoms: int = 0
    phantom_epochs: int = 8
    epochs: int = 50
    batch_size: int = 8
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: str = "constant"
    average: float = 0.0
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "dropout", tuple(self.dropout))
        for name, allowed in (
            ("activation", ACTIVATIONS),
            ("loss", tuple(LOSSES)),
            ("optimizer", tuple(OPTIMIZERS)),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}")
        for name in ("width", "epochs", "batch_size", "phantom_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.size < 2**LEVELS or self.size % 2**LEVELS:
            raise ValueError(
                f"size is {self.size}; {LEVELS} poolings need a multiple of {2**LEVELS}, such as 128"
            )
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        for name in ("augment", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name, share in (("average", self.average), *(("dropout", d) for d in self.dropout)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} is {share}; it must be 0 or more, and below 1")


@keras.saving.register_keras_serializable("helpers")
def dice_and_cross_entropy(truth, logits):
    """Dice loss of the whole batch plus binary cross-entropy, of logits (N, H, W, 1)."""
    truth, logits = ops.cast(truth, "float32"), ops.cast(logits, "float32")
    overlap = keras.losses.Dice()(truth, ops.sigmoid(logits))
    return overlap + keras.losses.BinaryCrossentropy(from_logits=True)(truth, logits)


@keras.saving.register_keras_serializable("helpers")
class MeanDice(keras.metrics.Metric):
    """Mean over images of the Dice of thresholded outputs; 1 where both masks are empty.

    Args:
        threshold: a larger output is lesion: 0 for logits, 0.5 for the ReLU head.
    """

    def __init__(self, threshold=0.0, name="dice", **options):
        super().__init__(name=name, **options)
        self.threshold = threshold
        self.total = self.add_weight(name="total", initializer="zeros")
        self.images = self.add_weight(name="images", initializer="zeros")

    def update_state(self, truth, output, sample_weight=None):
        lesion = ops.cast(output > self.threshold, "float32")
        truth = ops.cast(truth, "float32")
        axes = (1, 2, 3)
        both = ops.sum(truth * lesion, axes)
        size = ops.sum(truth, axes) + ops.sum(lesion, axes)
        dice = ops.where(size > 0, 2 * both / ops.maximum(size, 1), 1.0)
        self.total.assign_add(ops.sum(dice))
        self.images.assign_add(ops.cast(ops.shape(dice)[0], "float32"))

    def result(self):
        return self.total / ops.maximum(self.images, 1)

    def get_config(self):
        return super().get_config() | {"threshold": self.threshold}


LOSSES = {"mse": "mean_squared_error", "dice+ce": dice_and_cross_entropy}


def build(config=None):
    """Build a U-Net with random weights.

    Args:
        config: `Config`; None is the reference network.

    Returns:
        keras.Model named "unet", from float (N, size, size, 1) in 0..1 to (N, size, size, 1): logits,
        or with the loss "mse" the output of a ReLU. The last layer of each level is named "down_1"
        to "down_4", "bottleneck", "up_4" to "up_1".
    """
    config = config or Config()
    keras.utils.set_random_seed(config.seed)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(_policy(config.precision))
    try:
        return _network(config)
    finally:
        keras.config.set_dtype_policy(before)


def _network(config):
    def convolve(x, filters, name=None):
        x = layers.Conv2D(
            filters,
            3,
            padding="same",
            use_bias=not config.batch_norm,
            kernel_initializer="he_normal",
        )(x)
        if config.batch_norm:
            x = layers.BatchNormalization()(x)
        return layers.Activation(config.activation, name=name)(x)

    def level(x, filters, dropout, name):
        x = convolve(x, filters)
        x = layers.Dropout(dropout)(x)
        return convolve(x, filters, name)

    down, up = config.dropout
    image = x = keras.Input((config.size, config.size, 1), name="image")
    skips = []
    for k in range(LEVELS):
        x = level(x, config.width * 2**k, down, f"down_{k + 1}")
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    x = level(x, config.width * 2**LEVELS, down, "bottleneck")
    for k in reversed(range(LEVELS)):
        x = layers.Conv2DTranspose(config.width * 2**k, 2, strides=2)(x)
        x = layers.Concatenate()([x, skips[k]])
        x = level(x, config.width * 2**k, up, f"up_{k + 1}")
    activation = "relu" if config.loss == "mse" else "linear"
    x = layers.Conv2D(1, 1, activation=activation, dtype="float32", name="head")(x)
    return keras.Model(image, x, name="unet")


def device():
    """Return where networks run: "cuda" or "cpu"."""
    return "cuda" if _GPUS else "cpu"


def default_width():
    """Return the reference's 64 filters where there is a GPU, else what two cores train in minutes."""
    return 64 if _GPUS else CPU_WIDTH


def _policy(precision):
    if precision == "auto":
        from helpers.sam import multiplies_bfloat16

        without = "float16" if _GPUS else "float32"
        precision = "bfloat16" if multiplies_bfloat16(torch.device(device())) else without
    return precision if precision == "float32" else f"mixed_{precision}"


def pixels(rows, size):
    """Read images and masks, stretched to a square.

    Args:
        rows: rows of an index.
        size: pixels.

    Returns:
        (uint8 (N, size, size, 1) grey images, uint8 (N, size, size, 1) masks of 0 and 1).
    """
    images = np.stack([_stretch(data.read_image(path), size) for path in rows.image_path])
    masks = np.stack(
        [
            cv2.resize(
                data.read_truth(row).astype(np.float32), (size, size), interpolation=cv2.INTER_AREA
            )
            >= 0.5
            for row in rows.itertuples()
        ]
    )
    return images[..., None], masks[..., None].astype(np.uint8)


def _stretch(image, size):
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (size, size), interpolation=cv2.INTER_AREA)


def batches(rows, config, done=0):
    """Make the endless training stream: shuffled, augmented, the same for the same arguments.

    Args:
        rows: rows of an index.
        config: `Config`.
        done: steps to skip, which costs nothing.

    Returns:
        tf.data.Dataset of (images, masks), float32 (batch_size, size, size, 1) in 0..1.
    """
    images, masks = (tf.constant(array) for array in pixels(rows, config.size))

    def take(step, which):
        x, y = tf.gather(images, which), tf.gather(masks, which)
        x, y = tf.cast(x, tf.float32) / 255, tf.cast(y, tf.float32)
        return _augmented(x, y, config, step) if config.augment else (x, y)

    order = tf.data.Dataset.range(len(rows)).shuffle(len(rows), config.seed).repeat()
    steps = order.batch(config.batch_size, drop_remainder=True).enumerate().skip(done)
    return steps.map(take, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def _augmented(images, masks, config, step):
    """Move a batch and its masks alike, each image its own way, and change the images' gain."""
    number, size, strength = config.batch_size, config.size, config.augment
    draw = tf.random.stateless_uniform((9, number), (config.seed, step), -1, 1)
    turn = draw[0] * strength * math.radians(15)
    scale, stretch = tf.exp(draw[1] * strength * 0.25), tf.exp(draw[2] * strength * 0.1)
    mirror = tf.where(draw[3] < 0, -1.0, 1.0)
    shift = draw[4:6] * strength * 0.1 * size
    across = [tf.cos(turn) * scale * stretch * mirror, -tf.sin(turn) * scale / stretch]
    down = [tf.sin(turn) * scale * stretch * mirror, tf.cos(turn) * scale / stretch]
    middle = (size - 1) / 2  # output pixel (x, y) comes from input pixel (across, down)
    start_x = middle - middle * (across[0] + across[1]) + shift[0]
    start_y = middle - middle * (down[0] + down[1]) + shift[1]
    nothing = tf.zeros(number)
    transforms = tf.stack([*across, start_x, *down, start_y, nothing, nothing], axis=1)

    def move(batch):
        return tf.raw_ops.ImageProjectiveTransformV3(
            images=batch,
            transforms=transforms,
            output_shape=(size, size),
            interpolation="BILINEAR",
            fill_mode="CONSTANT",
            fill_value=0.0,
        )

    gamma, contrast, gain = (
        draw[k][:, None, None, None] * strength * share
        for k, share in ((6, 0.4), (7, 0.3), (8, 0.1))
    )
    images = tf.clip_by_value(move(images), 0, 1) ** tf.exp(gamma)
    images = tf.clip_by_value((images - 0.5) * (1 + contrast) + 0.5 + gain, 0, 1)
    return images, tf.round(move(masks))


def fit(train, val, folder="", report=None, **config):
    """Train a U-Net; it ends with the weights of the best epoch by mean Dice on `val`.

    The run is kept in a folder of its own, named by data and config. A stopped run goes on after its
    last whole epoch; a finished one is read.

    Args:
        train: rows of an index; normal images take part with their empty mask.
        val: rows of an index to choose the epoch by; never the test fold.
        folder: for the runs; "" is `helpers.cache.folder()`.
        report: called after each epoch with the history so far, a list of dicts; what it raises ends
            the training.
        config: the fields of `Config`.

    Returns:
        (keras.Model, DataFrame). The frame has one row per epoch from 1: `epoch`, `train_loss`,
        `val_loss`, `train_dice`, `val_dice` (on the network's own grid, normal images included; with
        augmentation the training columns are of augmented images), with the loss "mse" also Keras'
        `train_mean_iou` and `val_mean_iou`, `seconds`, `best` (True for the epoch that is kept) and
        `source`.

    Raises:
        ValueError: an unknown choice, or groups that lie in both sets.
        FloatingPointError: the loss is no finite number.
        OSError: the folder can't be written to.
    """
    config = Config(**config)
    data.check_apart(train, val)
    run = cache.folder(folder) / "unet" / _key(train, val, config)
    finished, table = run / "unet.keras", run / "history.csv"
    if finished.exists():
        print(f"this run was finished before; it is read from {finished}")
    else:
        run.mkdir(parents=True, exist_ok=True)
        _train(train, val, config, run, folder, report)
    history = pd.read_csv(table)
    history["best"] = history.epoch == history.epoch[history.val_dice.idxmax()]
    return load(finished), history.assign(source=train.source.iloc[0])


def _key(train, val, config):
    parts = [
        VERSION,
        keras.backend.backend(),
        dataclasses.asdict(config) | {"precision": _policy(config.precision)},
        data.signature(train),
        data.signature(val),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _train(train, val, config, run, folder, report):
    steps = max(1, len(train) // config.batch_size)
    state, table, best = run / "state.keras", run / "history.csv", run / "best.weights.h5"
    if state.exists():
        network = keras.models.load_model(state)
        done = int(network.optimizer.iterations) // steps
        history = pd.read_csv(table).query("epoch <= @done").to_dict("records")
    else:
        network, done, history = build(config), 0, []
        if config.phantoms:
            network.set_weights(_learn_from_phantoms(config, folder).get_weights())
        compile_network(network, config, config.epochs * steps)
    images, masks = pixels(val, config.size)
    validation = tf.data.Dataset.from_tensor_slices((images / np.float32(255), masks))
    keep = _Keep(history, state, table, best, config, report)
    network.fit(
        batches(train, config, done * steps),
        validation_data=validation.batch(config.batch_size),
        epochs=config.epochs,
        initial_epoch=done,
        steps_per_epoch=steps,
        callbacks=[*([keras.callbacks.SwapEMAWeights(True)] if config.average else []), keep],
        shuffle=False,  # the stream is shuffled
        verbose=0,
    )
    keep.write_history()
    network.load_weights(best)
    plain = build(config)  # without the optimiser, which is twice the network's size
    plain.set_weights(network.get_weights())
    save(plain, run / "unet.keras")
    for path in (state, best):
        path.unlink(missing_ok=True)


def _learn_from_phantoms(config, folder):
    """Train on synthetic images first; the run is kept and serves every split of the real ones."""
    train, val = synthetic.to_learn_from(config.phantoms, folder)
    first = dataclasses.asdict(config) | {"phantoms": 0, "epochs": config.phantom_epochs}
    print(f"first {len(train)} synthetic images, then the training images")
    return fit(train, val, folder, **first)[0]


def compile_network(network, config, steps):
    """Give a network its optimiser, loss and metrics, for training over `steps` steps."""
    rate = config.learning_rate
    if config.schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, steps)
    optimizer = OPTIMIZERS[config.optimizer](
        rate,
        weight_decay=config.weight_decay,
        use_ema=config.average > 0,
        ema_momentum=config.average or 0.99,
    )
    measures = [MeanDice(0.5 if config.loss == "mse" else 0.0)]
    if config.loss == "mse":
        measures.append(keras.metrics.MeanIoU(2, name="mean_iou"))
    network.compile(optimizer, LOSSES[config.loss], metrics=measures)
    optimizer.build(network.trainable_variables)  # now, or the graph of a step is traced twice


class _Keep(keras.callbacks.Callback):
    """Keeps the history, the best weights, and a state to resume from."""

    def __init__(self, history, state, table, best, config, report):
        super().__init__()
        self.seed, self.report = config.seed, report
        self.history, self.state, self.table, self.best = history, state, table, best
        self.progress = tqdm(
            total=config.epochs,
            initial=len(history),
            desc="training",
            unit="epoch",
            file=sys.stdout,
        )

    def on_epoch_begin(self, epoch, logs=None):
        # Here and not at the epoch's end, for there the averaged weights stand in for the raw ones.
        if epoch > self.progress.initial:
            self.write_history()
            save(self.model, self.state)
        for number, layer in enumerate(self.model.layers):
            if isinstance(layer, layers.Dropout) and layer.rate:  # a file does not keep its draws
                layer.seed_generator.state.assign([self.seed + number, epoch])
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"the training loss of epoch {epoch + 1} is {logs['loss']}; lower learning_rate, or use "
                "precision='float32'"
            )
        row = {"epoch": epoch + 1}
        for name in ("loss", "dice", "mean_iou"):
            if name in logs:
                row |= {f"train_{name}": logs[name], f"val_{name}": logs[f"val_{name}"]}
        if row["val_dice"] > max((past["val_dice"] for past in self.history), default=-1):
            _whole(self.best, self.model.save_weights)
        self.history.append(row | {"seconds": round(time.perf_counter() - self.start, 2)})
        self.progress.set_postfix_str(f"val Dice {row['val_dice']:.3f}")
        self.progress.update()
        if self.report:
            self.report(self.history)

    def on_train_end(self, logs=None):
        self.progress.close()

    def write_history(self):
        cache.write(self.table, pd.DataFrame(self.history).to_csv(index=False).encode())


def save(network, path):
    """Write a network to a .keras file, which appears whole or not at all."""
    _whole(path, network.save)


def _whole(path, write):
    scratch = path.with_name(f"scratch-{os.getpid()}-{path.name}")
    try:
        write(scratch)
        os.replace(scratch, path)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error}); make room or choose another"
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


def load(path):
    """Read a network that `save` or `fit` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no U-Net of `build`.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} does not exist; helpers.unet.fit and save write such files"
        )
    try:
        network = keras.models.load_model(path, compile=False)
    except Exception as error:
        raise ValueError(f"{path} can't be read as a Keras network: {error}") from error
    _check(network, path)
    return network


def _check(network, source):
    shape = getattr(network, "input_shape", None)
    if network.name != "unet" or network.output_shape != shape or shape[1] != shape[2]:
        raise ValueError(
            f"{source} is the network {network.name!r} from {shape} to {network.output_shape}, no U-Net "
            "of helpers.unet.build"
        )


def predict(network, image, mirror=False):
    """Find the lesion in one image.

    Args:
        network: from `build`, `fit` or `load`.
        image: uint8 (H, W, 3) RGB.
        mirror: average the logits with those of the mirrored image.

    Returns:
        float32 (H, W): the probability of lesion; the ReLU head's output, cut off at 1, stands for one.
    """
    return _probabilities(network, [image], mirror)[0]


def predict_masks(network, rows, mirror=False):
    """Return a dict from image_id to bool (H, W): `predict` above 0.5 for each row."""
    images = [data.read_image(path) for path in rows.image_path]
    found = _probabilities(network, images, mirror)
    return {name: found[i] > 0.5 for i, name in enumerate(rows.image_id)}


def _probabilities(network, images, mirror, batch_size=16):
    size = network.input_shape[1]
    batch = np.stack([_stretch(image, size) for image in images])[..., None] / np.float32(255)
    output = network.predict(batch, batch_size, verbose=0)
    if mirror:
        output = (
            output + network.predict(batch[:, :, ::-1], batch_size, verbose=0)[:, :, ::-1]
        ) / 2
    relu = network.get_layer("head").activation is keras.activations.relu
    return [_enlarge(grid[..., 0], image.shape[:2], relu) for grid, image in zip(output, images)]


def _enlarge(grid, shape, relu):
    grid = cv2.resize(grid.astype(np.float32), shape[::-1], interpolation=cv2.INTER_LINEAR)
    if relu:
        return np.clip(grid, 0, 1)
    return 1 / (1 + np.exp(-np.clip(grid, -80, 80)))


def levels(network):
    """List what each level of a U-Net makes: DataFrame of `level`, `side` (pixels) and `features`."""
    shapes = {name: network.get_layer(name).output.shape for name in LEVEL_NAMES}
    return pd.DataFrame(
        [{"level": name, "side": shape[1], "features": shape[3]} for name, shape in shapes.items()]
    )


def feature_maps(network, image):
    """Return what each level makes of an image: dict from level to float32 (side, side, features)."""
    size = network.input_shape[1]
    inner = keras.Model(network.input, [network.get_layer(name).output for name in LEVEL_NAMES])
    batch = (_stretch(image, size) / np.float32(255))[None, ..., None]
    maps = inner.predict(batch, verbose=0)
    return {name: found[0].astype(np.float32) for name, found in zip(LEVEL_NAMES, maps)}
