"""Synthetic breast-ultrasound images in BUSI's own layout, for whoever can't have BUSI itself.

A frame starts as a map of echogenicity in dB (skin, fat with Cooper's ligaments, fibroglandular tissue,
pectoral muscle, chest wall) with its lesions, is attenuated along the beam, and is seen through fully
developed speckle and log compression. The set also has BUSI's flaws, told in a `busi_groups.csv` of its own:
several masks for one image, near-duplicates, one frame in two class folders, burned-in marks, frames of the
axilla.

Sources: R. F. Wagner et al., "Statistics of speckle in ultrasound B-scans", IEEE Trans. Sonics Ultrason. 30
(1983) 156 (speckle); G. E. Trahey et al., "Speckle pattern correlation with lateral aperture translation",
IEEE Trans. UFFC 33 (1986) 257 (compounding of looks); A. T. Stavros et al., "Solid breast nodules",
Radiology 196 (1995) 123 (what benign and malignant lesions look like).
"""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image

CLASSES = ("benign", "malignant", "normal")
VERSION = 1
DATASET_FOLDER = "Dataset_BUSI_with_GT"
MARKER = "synthetic.json"  # its presence names the source
AXIAL_SIGMA = 1.3  # px, width of the point-spread function along the beam
LATERAL_SIGMA = (1.8, 4.2)  # px, across the beam: at the transducer and at the bottom
LOOKS = 3  # frames of independent speckle that the scanner averages
NOISE_DB = -40.0  # electronic noise, against glandular tissue at 0 dB


def make_busi(root: str | Path, images_per_class: int, seed: int = 0) -> Path:
    """Write a synthetic data set in BUSI's layout, whole or not at all.

    Image k of a class depends on the seed, the class and k alone, so a larger set begins with the images of a
    smaller one.

    Args:
        root: the folder to make; it may be absent or empty, or hold this very set (else FileExistsError).
        images_per_class: images in each of benign, malignant and normal, at least 1 (else ValueError). From 6
            on every flaw of BUSI occurs; from 8 on five groups are left per class without the `multiclass`
            images.

    Returns:
        `root`, with `Dataset_BUSI_with_GT/<class>/`, `busi_groups.csv` and, as the sign of a synthetic set,
        `synthetic.json`.
    """
    if images_per_class < 1:
        raise ValueError(f"images_per_class is {images_per_class}; it must be at least 1")
    root = Path(root)
    marker = {"generator": "helpers.synthetic", "version": VERSION}
    marker |= {"images_per_class": int(images_per_class), "seed": int(seed)}
    if _is_finished(root, marker):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        built = Path(scratch) / "set"
        _build(built, marker)
        try:
            built.rename(root)  # one step: of two builders at once, the second finds it done
        except OSError:
            if not _is_finished(root, marker):
                raise
    return root


def _is_finished(root, marker):
    """Tell this very set (True) from an absent or empty folder (False); else FileExistsError."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    path = root / MARKER
    found = path.read_text("utf-8") if path.is_file() else "no synthetic set"
    if found == json.dumps(marker):
        return True
    raise FileExistsError(
        f"{root} holds {found}, not {json.dumps(marker)}; name another folder, or delete this one"
    )


def _build(folder, marker):
    rows = []
    for label in CLASSES:
        target = folder / DATASET_FOLDER / label
        target.mkdir(parents=True)
        for number in range(1, marker["images_per_class"] + 1):
            rows.append(_write_image(target, label, number, marker["seed"]))
    pd.DataFrame(rows).to_csv(folder / "busi_groups.csv", index=False)
    (folder / MARKER).write_text(json.dumps(marker), "utf-8")


def _write_image(folder, label, number, seed):
    """Write one image with its masks and return its row of the table."""
    plan = _plan(label, number)
    name, source = ("{} ({})".format(*image) for image in (plan.own, plan.source))
    image, masks = _frame(plan, seed)
    colour = number % 40 == 8  # BUSI has a few truly RGB files
    image = burn_in(image, masks, plan.marks, colour, _generator(seed, plan.own, "marks"))
    Image.fromarray(image).save(folder / f"{name}.png", compress_level=1)
    for index, mask in enumerate(masks or [np.zeros(image.shape[:2], dtype=bool)]):
        suffix = f"_{index}" if index else ""
        # 1-bit for a lesion, RGB for a normal image: BUSI mixes the forms
        form = Image.fromarray(mask).convert("1" if masks else "RGB")
        form.save(folder / f"{name}_mask{suffix}.png", compress_level=1)
    return {
        "image": name,
        "class": label,
        "group_same_frame": source if plan.same_frame else name,
        "group_extended": source,
        "objection": plan.objection,
        "annotation": "&".join(plan.marks),
        "n_masks": max(len(masks), 1),
    }


# What each image is


@dataclass(frozen=True)
class Plan:
    """What an image shows, and what is wrong with it; images are (label, number)."""

    own: tuple
    source: tuple  # the image whose anatomy this one shows, most often itself
    same_frame: bool  # it shows the source's speckle too
    objection: str
    marks: list


def _plan(label, number):
    """Assign BUSI's flaws by number: small sets have them too, large ones in BUSI's shares."""
    own = source = (label, number)
    cycle = number % 12
    if cycle in (4, 5):  # a near-duplicate, another frame of the same lesion
        source = (label, number - 3)
    objection = "axilla" if _is_axilla(*source) else ""
    if label != "normal" and number % 36 == 6:
        source, objection = ("benign", number), "multiclass"
    marks = {"measurement": label != "normal" and cycle in (4, 8), "text": number % 6 == 2}
    marks["pictogram"] = number % 36 == 1
    return Plan(own, source, cycle != 5, objection, [name for name, on in marks.items() if on])


def _is_axilla(label, number):
    return number % 12 == (9 if label == "benign" else 3)


def _generator(seed, image, purpose):
    purposes = ("anatomy", "speckle", "frame", "marks")
    label, number = image
    return np.random.default_rng([seed, CLASSES.index(label), number, purposes.index(purpose)])


def _frame(plan, seed):
    """Return one frame without marks: uint8 (H, W) and a list of bool (H, W) lesion masks."""
    echo_db, lesions = _scene(_generator(seed, plan.source, "anatomy"), *plan.source)
    if plan.source == plan.own:
        return _scan(_generator(seed, plan.own, "speckle"), echo_db, lesions)
    change = _generator(seed, plan.own, "frame")
    if plan.same_frame:
        return _save_again(change, *_scan(_generator(seed, plan.source, "speckle"), echo_db, lesions))
    return _scan(_generator(seed, plan.own, "speckle"), *_move_probe(change, echo_db, lesions))


def _save_again(rng, image, masks):
    """Crop up to 4 % off each side and change the gain, as between BUSI's near-duplicates."""
    height, width = image.shape
    top, bottom = (rng.uniform(0, 0.04, 2) * height).astype(int)
    left, right = (rng.uniform(0, 0.04, 2) * width).astype(int)
    window = (slice(top, height - bottom), slice(left, width - right))
    image = cv2.convertScaleAbs(image[window], alpha=rng.uniform(0.85, 1.15))
    return image, [mask[window] for mask in masks]


def _move_probe(rng, echo_db, lesions):
    """Return the same anatomy, seen with the probe shifted and pressed a little differently."""
    height, width = echo_db.shape
    z, x = np.mgrid[:height, :width].astype(np.float32)
    bend = 0.03 * height * _noise(rng, z.shape, height / 6, width / 6)
    down = bend * z / height - rng.uniform(0.03, 0.1) * z
    right = rng.uniform(0.01, 0.07) * width - 0.08 * x
    for lesion in lesions:
        lesion.mask = _largest_part(_shift(lesion.mask, down, right) > 0.5)
        lesion.coverage = _shift(lesion.coverage, down, right)
    return _shift(echo_db, down, right), lesions


# The tissue


def _noise(rng, shape, scale_z, scale_x):
    """Return a smooth Gaussian random field, float32 `shape`, unit variance; scales in px."""
    blur = 2.0  # samples of the coarse grid per scale
    grid = [math.ceil(n * blur / scale) + 2 for n, scale in zip(shape, (scale_z, scale_x))]
    coarse = cv2.GaussianBlur(rng.standard_normal(grid, dtype=np.float32), (0, 0), blur)
    coarse *= 2 * math.sqrt(math.pi) * blur
    return cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)


def _step(value, width):
    """Return a soft step from 0 to 1 at value 0."""
    return 0.5 + 0.5 * np.tanh(value / (2 * width))


def _line(distance, sigma):
    return np.exp(-0.5 * (distance / sigma) ** 2)


def _shift(field, down, right):
    """Return `field` as float32 (H, W), each pixel read `down` and `right` px further on."""
    z, x = np.mgrid[: field.shape[0], : field.shape[1]]
    where = [(x + right).astype(np.float32), (z + down).astype(np.float32)]
    return cv2.remap(field.astype(np.float32), *where, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _fibres(rng, shape, scale_z, scale_x, thickness):
    """Return thin interfaces, float32 `shape` from 0 to 1: the zero lines of a smooth field.

    Like a real interface they are bright where they lie across the beam and fade where they run along it.
    """
    field = _noise(rng, shape, scale_z, scale_x)
    slope_z, slope_x = np.gradient(field)
    slope = np.hypot(slope_z, slope_x) + 0.1 / scale_z
    patchy = _step(_noise(rng, shape, 2 * scale_z, scale_x), 0.35)
    across = (slope_z / slope) ** 2
    return across**2 * patchy * _line(field, slope * thickness * (0.5 + patchy))


def _tissue(rng, shape, axilla):
    """Return the echogenicity of a frame without lesions, float32 (H, W) in dB."""
    height, width = shape
    z = np.arange(height, dtype=np.float32)[:, None] / height
    fat_end = rng.uniform(0.12, 0.36)
    gland_end = fat_end + (0.04 if axilla else rng.uniform(0.2, 0.45))
    muscle_end = gland_end + rng.uniform(0.12, 0.3)

    def noise(scale_z, scale_x):
        return _noise(rng, shape, scale_z * height, scale_x * width)

    def fibres(scale_z, scale_x, thickness):
        return _fibres(rng, shape, scale_z * height, scale_x * width, thickness)

    fat = rng.uniform(-18, -10) + 1.5 * noise(0.02, 0.03)
    gland = 0.8 * fat * _step(noise(0.035, 0.06) + rng.uniform(-1, 1), 0.25)  # lobules of fat
    gland += 4 * noise(0.025, 0.05) + 4 * noise(0.007, 0.025)
    gland += 18 * fibres(0.012, 0.05, 1.8) + 20 * fibres(0.03, 0.08, 1.9)
    muscle = rng.uniform(-17, -10) + 3 * noise(0.008, 0.15) + 22 * fibres(0.014, 0.12, 1.8)
    deep = rng.uniform(-20, -12) + 3 * noise(0.02, 0.1) + 13 * fibres(0.025, 0.16, 1.9)
    layers = fat + rng.uniform(16, 28) * fibres(rng.uniform(0.018, 0.03), 0.13, 1.6)
    for boundary, layer in ((fat_end, gland), (gland_end, muscle), (muscle_end, deep)):
        below = z - boundary - 0.025 * noise(0.3, 0.08) - 0.006 * noise(0.05, 0.02)
        layers = layers + _step(below, rng.uniform(0.003, 0.03)) * (layer - layers)
        layers += 14 * _line(below * height, 1.8) * _step(noise(0.2, 0.08), 0.4)  # a fascia
    tilt = rng.normal(0, 0.07) * np.linspace(-0.5, 0.5, width, dtype=np.float32)
    undulation = 0.02 * noise(0.15, 0.12) + 0.006 * noise(0.04, 0.05)
    layers = _shift(layers, height * (tilt + undulation), 0)
    skin_end = rng.uniform(0.015, 0.045)
    skin = 8 * _line((z - skin_end) * height, 1.6) - 4 + 2 * noise(0.006, 0.3)
    return skin + _step(z - skin_end - 0.006, 0.002) * (layers - skin)


# The lesion


@dataclass
class Lesion:
    """What the annotator draws of a lesion, and what the beam meets."""

    mask: np.ndarray  # bool (H, W)
    coverage: np.ndarray  # float32 (H, W), 0 outside to 1 inside, soft at an ill-defined margin
    through_db: float  # what the beam gains (or, below 0, loses) on its way through
    edge_db: float  # what it loses by refraction where it grazes the margin


def _scene(rng, label, number):
    """Draw the anatomy: echogenicity, float32 (H, W) in dB, and the lesions in it."""
    height = int(np.clip(rng.normal(500, 65), 360, 680))
    width = int(np.clip(height * rng.normal(1.22, 0.14), 350, 800))
    echo_db = _tissue(rng, (height, width), _is_axilla(label, number))
    centres, largest = [rng.normal(0.48, 0.12)], 0.26
    if label == "normal":
        centres = []
    elif label == "benign" and number % 36 == 3:  # BUSI's images with several masks are benign
        centres, largest = [rng.uniform(0.22, 0.3), rng.uniform(0.7, 0.78)], 0.03
    lesions = []
    for centre in centres:
        echo_db, lesion = _add_lesion(rng, echo_db, label == "benign", centre, largest)
        lesions.append(lesion)
    return echo_db, lesions


def _add_lesion(rng, echo_db, benign, centre, largest):
    """Return tissue `echo_db`, float32 (H, W), with one lesion in it, and the Lesion.

    Benign: an oval wider than tall, with a capsule and enhancement behind it; else an irregular shape
    taller than wide, with an ill-defined margin, a halo and a shadow (Stavros 1995). `centre` is a share
    of the width, `largest` the greatest area as a share of the image.
    """
    height, width = echo_db.shape
    median, spread, smallest = (0.042, 1.0, 0.006) if benign else (0.125, 0.75, 0.02)
    area = np.clip(rng.lognormal(math.log(median), spread), smallest, largest) * height * width
    aspect = rng.lognormal(math.log(1.65 if benign else 0.78), 0.17)  # width over height
    half_x = min(math.sqrt(area * aspect / math.pi), 0.42 * width)
    half_z = min(math.sqrt(area / aspect / math.pi), 0.36 * height)
    size = math.sqrt(half_x * half_z)
    room_z = 1.15 * half_z + 0.06 * height
    room_x = min(max(1.1 * half_x, 0.12 * width), 0.49 * width)
    row = np.clip(rng.normal(0.33 if benign else 0.39, 0.1) * height, room_z, height - room_z)
    column = np.clip(centre * width, room_x, width - room_x)

    z, x = np.mgrid[:height, :width].astype(np.float32)
    rough = (0.03 if benign else 0.08) * size
    z += rough * _noise(rng, z.shape, size / 4, size / 4) - row
    x += rough * _noise(rng, z.shape, size / 4, size / 4) - column
    turn = rng.normal(0, 0.12)
    across = (x * math.cos(turn) + z * math.sin(turn)) / half_x
    along = (z * math.cos(turn) - x * math.sin(turn)) / half_z
    radius, angle = cv2.cartToPolar(across, along)
    slot = (angle * (1440 / (2 * math.pi))).astype(np.int32) % 1440
    margin, drawn = _contour(rng, benign)
    inward = (margin[slot] - radius) * size  # px from the margin
    mask = _largest_part(radius < drawn[slot])
    coverage = _step(inward, 1.2 if benign else rng.uniform(3, 8))
    coverage *= _step(z + row - 0.06 * height, 2.0)  # the skin stays whole

    push = (0.55 if benign else 0.25) * _line(radius, 1.1)  # a growing mass bends the layers
    echo_db = _shift(echo_db, -push * z, -push * x)
    inside = echo_db[mask].mean() + _lesion_texture(rng, z.shape, benign)
    echo_db += coverage * (inside - echo_db)
    if benign:  # the capsule shows where it lies across the beam
        echo_db += rng.uniform(2, 8) * _line(inward, 1.5) * np.abs(along)
        return echo_db, Lesion(mask, coverage, rng.uniform(3, 11), rng.uniform(1, 7))
    echo_db += rng.uniform(0, 7) * _line(inward + 12, 8) * _step(_noise(rng, z.shape, 40, 40), 0.5)
    return echo_db, Lesion(mask, coverage, -rng.uniform(5, 18), 0.0)


def _contour(rng, benign):
    """Return two radii over the angle, float32 (1440,): the true margin and the drawn one.

    They differ by the spicules of a malignant lesion, which an annotator does not follow.
    """
    angle = np.linspace(0, 2 * np.pi, 1440, endpoint=False, dtype=np.float32)
    drawn = np.zeros_like(angle)
    for order in range(2, 5 if benign else 10):
        wave = rng.normal(0, (0.05 if benign else 0.13) / order**0.7)
        drawn += wave * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    drawn = np.exp(drawn - np.log(np.mean(np.exp(2 * drawn))) / 2)  # keeps the area
    margin = drawn.copy()
    for direction in rng.uniform(0, 2 * np.pi, 0 if benign else rng.integers(24)):
        margin += rng.uniform(0.04, 0.18) * np.exp(350 * (np.cos(angle - direction) - 1))
    return margin, drawn


def _lesion_texture(rng, shape, benign):
    """Return the echogenicity in a lesion, float32 (H, W) in dB against the tissue it replaces."""
    texture = _noise(rng, shape, 0.01 * shape[0], 0.02 * shape[0])
    patches = _noise(rng, shape, 0.035 * shape[0], 0.035 * shape[0])
    if benign:
        cyst = rng.random() < 0.2
        return texture + 2 * patches - (23 if cyst else rng.uniform(9, 16))
    texture = 1.5 * texture + 3 * patches - rng.uniform(8, 14)
    if rng.random() < 0.4:  # microcalcifications
        texture += 22 * np.clip(_noise(rng, shape, 1.2, 1.6) - 2.6, 0, 1)
    return texture


def _largest_part(mask):
    _, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()


# The scanner


def _scan(rng, echo_db, lesions):
    """Image a scene: uint8 (H, W) and the lesions' masks."""
    echo_db = echo_db + _leftover_gain(rng, echo_db.shape) + sum(map(_behind, lesions))
    amplitude = np.sqrt(10 ** (echo_db / 10) + 10 ** (NOISE_DB / 10))
    looks = [_speckle(rng, amplitude) for _ in range(LOOKS)]
    level_db = 20 * np.log10(np.mean(looks, axis=0) + 1e-6)
    level_db = cv2.GaussianBlur(level_db, (0, 0), sigmaX=1.0, sigmaY=0.7)  # speckle reduction
    dynamic_range, middle = rng.uniform(55, 65), rng.uniform(70, 100)
    grey = middle + 255 * (level_db - np.median(level_db)) / dynamic_range
    return np.clip(grey, 0, 255).astype(np.uint8), [lesion.mask for lesion in lesions]


def _leftover_gain(rng, shape):
    """Return what time-gain compensation leaves of the attenuation, float32 (H, W) in dB."""
    height, width = shape
    z = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(0, 1, width, dtype=np.float32)
    gain = _noise(rng, (height, 2), 0.12 * height, 2)[:, :1]  # it ripples between the gain sliders
    gain = gain - rng.uniform(14, 40) * np.clip(z - rng.uniform(0, 0.35), 0, None)
    for _ in range(rng.integers(4)):  # places of poor contact
        contact = _line(x - rng.random(), rng.uniform(0.01, 0.05) * (1 + z))
        gain = gain - rng.uniform(2, 8) * z * contact
    return gain - rng.uniform(0, 6) * np.abs(2 * x - 1) ** 3


def _behind(lesion):
    """Return how a lesion changes the echoes in it and behind it, float32 (H, W) in dB.

    The compensation assumes ordinary tissue, so what the beam loses less or more on its way through the
    lesion stays as posterior enhancement or as a shadow. The way is shorter at the sides, which softens them;
    refraction darkens the lines that graze the margin.
    """
    path = np.cumsum(lesion.coverage, axis=0, dtype=np.float32)
    beam = 0.1 * math.sqrt(lesion.mask.sum())
    path = cv2.GaussianBlur(path / path.max(), (0, 0), sigmaX=beam, sigmaY=1)
    grazing = np.abs(cv2.Sobel(path, cv2.CV_32F, 1, 0))
    return lesion.through_db * path - lesion.edge_db * grazing / grazing.max()


def _speckle(rng, amplitude):
    """Return one look's envelope over fully developed speckle, float32 (H, W), of the same mean power.

    Many scatterers per resolution cell add up to circular complex Gaussian echoes, so the envelope is
    Rayleigh distributed: its mean is 1.91 of its standard deviations (Wagner 1983). The point-spread function
    is demodulated, as a carrier only turns phases that are uniform already. The speckle is finer along the
    beam than across it, and widens with depth.
    """
    height, width = amplitude.shape
    echoes = rng.standard_normal((height, width, 2), dtype=np.float32) * amplitude[..., None]
    echoes = cv2.GaussianBlur(echoes, (1, 0), sigmaX=1, sigmaY=AXIAL_SIGMA).view(np.complex64)
    lateral = np.linspace(*LATERAL_SIGMA, height, dtype=np.float32)[:, None]
    padded = 32 * math.ceil((width + 16) / 32)  # one side must not leak into the other
    frequency = np.fft.fftfreq(padded).astype(np.float32)
    transfer = np.exp(-2 * (np.pi * lateral * frequency) ** 2)
    spectrum = np.fft.fft(echoes[..., 0], padded, axis=1) * transfer
    envelope = np.abs(np.fft.ifft(spectrum, axis=1)[:, :width])
    return envelope * np.sqrt(2 * np.pi * AXIAL_SIGMA * lateral)  # undoes the filters' loss


# The marks


def burn_in(image: np.ndarray, masks: list, marks, colour: bool, rng) -> np.ndarray:
    """Draw marks into a frame, uint8 (H, W) or (H, W, 3), as operators do.

    `marks` are of "measurement" (calipers on the first of `masks`, bool (H, W)), "text" and "pictogram". With
    `colour` the ink is yellow, and a grey frame is returned as (H, W, 3). `rng` is a numpy Generator.
    """
    image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if colour and image.ndim == 2 else image.copy()
    ink = (230, 220, 60) if colour else (235, 235, 235)
    height, width = image.shape[:2]
    if "measurement" in marks:
        _draw_calipers(image, masks[0], ink)
    if "text" in marks:
        words = rng.choice(["RT UOQ", "LT UOQ", "LT BREAST", "RT 10 OC", "LT LIQ", "RT"])
        place = (rng.uniform((0.02, 0.7), (0.5, 0.9)) * (width, height)).astype(int).tolist()
        _draw_text(image, str(words), place, ink)
    if "pictogram" in marks:  # a breast seen from the front, and the probe on it
        centre, turn = np.array([width - 40, height - 40]), rng.uniform(0, 2 * np.pi)
        outward = np.array([math.cos(turn), math.sin(turn)])
        ends = [centre + 18 * outward + half * outward[::-1] * (-1, 1) for half in (-9, 9)]
        left, right = (end.astype(int).tolist() for end in ends)
        cv2.circle(image, centre.tolist(), 30, ink, 1, cv2.LINE_AA)
        cv2.line(image, left, right, ink, 3, cv2.LINE_AA)
    return image


def _draw_calipers(image, mask, ink):
    """Draw dotted lines between plus signs along a lesion's two main axes, the longer one first."""
    points = np.argwhere(mask)[:, ::-1].astype(np.float32)
    centre, sizes, angle = cv2.minAreaRect(points)
    axes = sorted(zip(sizes, (angle, angle + 90)), reverse=True)
    for number, (size, turn) in enumerate(axes, start=1):
        half = 0.48 * size * np.array([math.cos(math.radians(turn)), math.sin(math.radians(turn))])
        for share in np.linspace(-1, 1, max(int(size / 5), 2)):
            x, y = (centre + share * half).astype(int).tolist()
            cv2.rectangle(image, (x, y), (x + 1, y + 1), ink, -1)
        for end in (centre - half, centre + half):
            cv2.drawMarker(image, end.astype(int).tolist(), ink, cv2.MARKER_CROSS, 13, 2)
        _draw_text(image, str(number), (end + (6, 14)).astype(int).tolist(), ink)


def _draw_text(image, words, place, ink):
    cv2.putText(image, words, place, cv2.FONT_HERSHEY_SIMPLEX, 0.55, ink, 2, cv2.LINE_AA)
