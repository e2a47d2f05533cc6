"""Draws of every pipeline that the presets have, on images in memory: `python tests/draw_augmentations.py 20000`."""

import argparse
import random
import time
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from incubate_lib.config import DataSettings, MachineSettings, TrainingSettings, load_settings, presets
from incubate_lib.data.folders import Source
from incubate_lib.data.order import Order
from incubate_lib.data.sets import ImageSet
from incubate_lib.data.stream import StreamedSet
from incubate_lib.phases.networks import model_shape

FIELDS = ("randaugment", "color_jitter", "erase", "hflip", "shift")  # of a recipe, that decide how an image is augmented
BATCH = 50
HERE = MachineSettings(workers=0)


@dataclass(frozen=True)
class Pipeline:
    """What is done to each image: a recipe's fields, the size that comes out (C, H, W), streamed or held in memory."""

    recipe: tuple
    shape: tuple[int, int, int]
    streamed: bool

    def __str__(self) -> str:
        fields = [f"{name} {value}" for name, value in zip(FIELDS, self.recipe, strict=True) if value]
        kind = "streamed" if self.streamed else "in memory"
        return f"{kind}, {' × '.join(map(str, self.shape))}, {', '.join(fields) or 'nothing'}"


def pipelines() -> list[Pipeline]:
    """Return every distinct pipeline of every phase of every strategy of every preset that tells images apart."""
    found = {}
    for settings in map(load_settings, presets()):
        if settings.task != "classification":
            continue
        shape = model_shape(settings.model)
        for strategy, how in settings.strategies.items():
            for phase in how.trains:
                training = settings.training_of(strategy, phase)
                values = tuple(getattr(training, field) for field in FIELDS)
                found[Pipeline(values, shape, settings.data.is_streamed)] = None
    return list(found)


@dataclass(frozen=True)
class Pictures:
    """Opens images that are made as they are asked for: all sorts of contrasts, colours and proportions."""

    mode: str

    def __call__(self, i: int) -> Image.Image:
        rng = np.random.default_rng(i)
        height, width = rng.integers(8, 72, 2)
        coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8) // int(rng.integers(1, 9))  # dark ones, too
        return Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC).convert(self.mode)

    def name(self, i: int) -> str:
        return f"picture {i}"


def images_of(pipeline: Pipeline, number: int) -> StreamedSet | ImageSet:
    """Return a set of images for a pipeline."""
    channels, labels = pipeline.shape[0], np.zeros(number, dtype=np.int64)
    if pipeline.streamed:
        opener = Pictures("L" if channels == 1 else "RGB")
        settings = DataSettings(source="folder", folder="memory")
        source = Source(labels, ["all"], opener=opener)
        return StreamedSet(source, np.arange(number), pipeline.shape, 1, settings, torch.device("cpu"), HERE)
    pixels = torch.randint(0, 256, (number, *pipeline.shape), dtype=torch.uint8)
    mean = std = torch.full((channels, 1, 1), 0.5)
    return ImageSet(pixels, torch.from_numpy(labels), mean, std, 1)


def draw(pipeline: Pipeline, number: int, seed: int = 0) -> int:
    """Draw so many augmented images as an update of a training gets them; return how many came out, and check each."""
    recipe = TrainingSettings(**dict(zip(FIELDS, pipeline.recipe, strict=True)), batch_size=BATCH)
    images, drawn = images_of(pipeline, number), 0
    random.seed(seed)
    torch.manual_seed(seed)
    for made, _ in images.batches(Order(number, recipe, seed=seed, steps=number // BATCH)):
        assert made.dtype == torch.uint8 and tuple(made.shape) == (BATCH, *pipeline.shape)
        assert images.finish(made, recipe).isfinite().all()
        drawn += len(made)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int, nargs="?", default=4000, help="draws of each pipeline (a multiple of 50)")
    number = parser.parse_args().number
    for pipeline in pipelines():
        began = time.perf_counter()
        print(f"{draw(pipeline, number)} draws in {time.perf_counter() - began:.0f} s: {pipeline}", flush=True)


if __name__ == "__main__":
    main()
