"""Time fine-tuning on cached embeddings against the usual loop: same images, steps, order and seed.

    python tests/benchmarks/finetune.py [--images 16] [--epochs 20] [--checkpoint lite-medsam]

Exits with 1 where a bound is missed. Three loops start from the same weights with the usual config, each
in a process of its own, and each takes the validation loss after every epoch:

- the usual loop: plain float32, every image through the frozen encoder in every epoch;
- the limit: every image through the fast encoder once, then the decoder's steps on tensors in memory;
- ours: `Segmenter.fit` with an empty cache.

What is printed are ratios within this run, for machines differ and are noisy. $BUSI_DIR names the
images, else simulated ones stand in. `--checkpoint vit-b` takes a ViT-B of SAM's full size with random
weights: its times are SAM's, its masks mean nothing.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from monai.losses import DiceCELoss

from helpers import data, images, prompts, sam

BATCH, SEED, LEARNING_RATE = 2, 0, 1e-5
FASTER, OVER = 11, 1.05  # of the usual loop's time, of the limit's


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=16, help="to train on; a third of it validates")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--checkpoint", default="lite-medsam", help="or vit-b, random weights")
    parser.add_argument("--precision", default="auto", help="of ours and of the limit")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = options.checkpoint
        if checkpoint == "vit-b":
            checkpoint = random_vit_b(Path(scratch) / "sam-vit-b")
        train, val = rows(options.images)
        print(
            f"{options.checkpoint}, {train.source.iloc[0]}: {len(train)} images train, {len(val)} "
            f"validate, {options.epochs} epochs",
            flush=True,
        )
        arguments = (checkpoint, options.precision, train, val, options.epochs, scratch)
        usual, limit, ours = (alone(loop, arguments) for loop in (usual_loop, limit_loop, our_loop))
    faster, over = usual["seconds"] / ours["seconds"], ours["seconds"] / limit["seconds"]
    apart = abs(usual["loss"] - ours["loss"]) / usual["loss"]
    print(f"ours is {faster:.1f} times as fast as the usual loop (bound: {FASTER})")
    print(f"ours takes {over:.3f} of the limit's time (bound: {OVER})")
    print(f"validation losses lie {apart:.1%} apart (bound: 1 %)")
    bound = 4 if options.checkpoint == "lite-medsam" else np.inf
    print(f"ours takes {ours['memory']:.2f} GB at its peak (bound: {bound})")
    held = faster >= FASTER and over <= OVER and apart <= 0.01 and ours["memory"] < bound
    print("every bound holds" if held else "a bound is missed")
    return not held


def random_vit_b(folder):
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    torch.manual_seed(SEED)
    SamModel(SamConfig()).save_pretrained(folder)
    SamProcessor(SamImageProcessor()).save_pretrained(folder)
    return str(folder)


def rows(count):
    """Return training and validation rows of one lesion each, spread over the subsets of fold 0."""
    split = data.lesions(data.split(data.load_dataset("auto")))
    split = split[[len(images.parts(data.read_truth(row))) == 1 for row in split.itertuples()]]
    return data.scored(split, "train", count), data.scored(split, "val", max(1, count // 3))


def alone(loop, arguments):
    """Run a loop in a process of its own, so that its peak memory is its own."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as pool:
        found = pool.apply(measured, (loop, *arguments))
        pool.close()
        pool.join()  # leaving the block would kill the process before it has cleaned up
    print(
        f"{loop.__name__.replace('_', ' ')}: {found['seconds']:.1f} s, validation loss "
        f"{found['loss']:.4f}, peak memory {found['memory']:.2f} GB",
        flush=True,
    )
    return found


def measured(loop, *arguments):
    seconds, loss = loop(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes
    return {"seconds": seconds, "loss": loss, "memory": peak}


def usual_loop(checkpoint, precision, train, val, epochs, scratch):
    """What the tutorials do; the padding of the truth is the only thing they do otherwise."""
    segmenter = sam.load(checkpoint, "cpu")
    segmenter.model.to(memory_format=torch.contiguous_format)

    def logits(row):
        image = data.read_image(row.image_path)
        pixels, [resized] = sam.preprocess([image], segmenter.preprocessing)
        truth = data.read_truth(row)
        box = sam.scale_box(prompts.mask_to_box(truth), truth.shape, resized)
        features = segmenter.model.vision_encoder(pixels)[0]
        return features, box[None], truth, resized

    return learn(segmenter, train, val, epochs, logits, time.perf_counter())


def limit_loop(checkpoint, precision, train, val, epochs, scratch):
    """One pass of the encoder; then everything lies in memory."""
    segmenter = sam.load(checkpoint, "cpu", precision)
    begun = time.perf_counter()
    ready = {}
    for row in [*train.itertuples(), *val.itertuples()]:
        [embedding] = segmenter.embed([data.read_image(row.image_path)])
        truth = data.read_truth(row)
        box = sam.scale_box(prompts.mask_to_box(truth), truth.shape, embedding.resized)
        ready[row.image_id] = embedding.features[None], box[None], truth, embedding.resized
    return learn(segmenter, train, val, epochs, lambda row: ready[row.image_id], begun)


def learn(segmenter, train, val, epochs, example, begun):
    """Train the mask decoder; return the seconds since `begun` and the last validation loss."""
    decoder = segmenter.model.mask_decoder.requires_grad_(True)
    bfloat16 = segmenter.precision == "bfloat16"
    optimizer = torch.optim.Adam(decoder.parameters(), lr=LEARNING_RATE)
    criterion = DiceCELoss(sigmoid=True, squared_pred=True)

    def loss_of(batch):
        features, boxes, truths, sizes = zip(*map(example, batch))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = segmenter.decode(torch.cat(features), torch.cat(boxes))
        logits = logits[:, None].float()
        targets = torch.stack(
            [target(*pair, logits.shape[-1], segmenter.preprocessing) for pair in zip(truths, sizes)]
        )
        return criterion(logits, targets)

    for epoch in range(1, epochs + 1):
        order = np.random.default_rng([SEED, epoch]).permutation(len(train))
        batches = [list(train.iloc[order[i : i + BATCH]].itertuples()) for i in range(0, len(train), BATCH)]
        for batch in batches:
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses = [loss_of([row]).item() for row in val.itertuples()]
    return time.perf_counter() - begun, float(np.mean(losses))


def target(truth, resized, grid, preprocessing):
    """Resize and pad a truth like its image: float32 (1, grid, grid)."""
    height, width = (max(1, round(side * grid / preprocessing.input_size)) for side in resized)
    # torch's own "area" averages whole pixels: with it, the loss of a small lesion is a tenth lower.
    small = cv2.resize(truth.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    padding = (0, grid - width, 0, grid - height)
    return torch.nn.functional.pad(torch.from_numpy(small)[None] > 0.5, padding).float()


def our_loop(checkpoint, precision, train, val, epochs, scratch):
    segmenter = sam.load(checkpoint, "cpu", precision)
    begun = time.perf_counter()
    history = segmenter.fit(train, val, scratch, epochs=epochs)
    return time.perf_counter() - begun, history.val_loss.iloc[-1]


if __name__ == "__main__":
    sys.exit(main())
