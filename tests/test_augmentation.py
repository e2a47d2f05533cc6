"""What the presets' recipes can do to an image: every operation at every strength, thousands of draws, and what fails is told."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from draw_augmentations import FIELDS, Pictures, draw, pipelines
from layouts import AUGMENTED, open_folder, settings_file, write_folder
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN

from incubate_lib.config import DataSettings, MachineSettings, SettingsError, TrainingSettings
from incubate_lib.data import stream, transforms
from incubate_lib.data.order import Order
from incubate_lib.data.sets import load_data
from incubate_lib.pipeline.strategies import open_phase

PIPELINES = pipelines()
RECIPES = sorted({pipeline.recipe[FIELDS.index("randaugment")] for pipeline in PIPELINES if pipeline.streamed})
OTHERS = ["rand-m9", "rand-m15-mmax20-inc1", "augmix-m10-mstd0", "v0", "v0r-mstd2", "original", "originalr-mstd2", "3a"]
PARTS = 4  # of the draws, so that two processes can share them


def transform(randaugment: str, shape=(3, 24, 24)):
    recipe, mean = TrainingSettings(randaugment=randaugment), IMAGENET_DEFAULT_MEAN[: shape[0]]
    return stream.make_transform(shape, recipe, crop_pct=0.875, mean=mean)


@pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
@pytest.mark.parametrize("part", range(PARTS))
def test_4000_draws_of_every_pipeline_of_the_presets(pipeline, part):
    assert draw(pipeline, 4000 // PARTS, seed=part) == 4000 // PARTS


def test_any_number_of_draws_by_a_command():
    script = Path(__file__).with_name("draw_augmentations.py")
    output = subprocess.run([sys.executable, str(script), "50"], capture_output=True, text=True, check=True).stdout
    assert output.count("50 draws in ") == len(PIPELINES) and all(str(pipeline) in output for pipeline in PIPELINES)


@pytest.mark.parametrize(
    ("randaugment", "channels"), [*((recipe, channels) for recipe in RECIPES for channels in (1, 3)), *((o, 3) for o in OTHERS)]
)
def test_every_operation_works_at_every_strength(randaugment, channels):
    """From none to the largest, in steps finer than those of solarizing, which has most: 256 for strengths up to 10."""
    found = transforms.operations(transform(randaugment, (channels, 24, 24)))
    assert found
    image = Pictures("L" if channels == 1 else "RGB")(0).resize((9, 8))
    for operation in {operation.name: operation for operation in found}.values():
        operation.prob, operation.magnitude_std = 1.0, 0.0
        top = operation.magnitude_max or 10
        for strength in np.linspace(0, top, 30 * top + 1):
            operation.magnitude = float(strength)
            made = operation(image)
            assert (made.size, made.mode) == (image.size, image.mode), f"{operation.name} at {strength}"


@pytest.mark.parametrize("randaugment", [*RECIPES, *OTHERS[:-1]])  # the last has none
def test_posterizing_keeps_the_highest_bits_and_none_is_black(randaugment):
    """What pillow has always done, and with 0 bits refuses to do from 13 on."""
    found = [operation for operation in transforms.operations(transform(randaugment)) if "Posterize" in operation.name]
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    image = Image.fromarray(pixels)
    assert found
    for operation in found:
        operation.prob, operation.magnitude_std = 1.0, 0.0
        kept = set()
        for strength in range((operation.magnitude_max or 10) + 1):
            operation.magnitude = strength
            (bits,) = operation.level_fn(strength, operation.hparams)
            mask = 256 - 2 ** (8 - max(bits, 0))
            assert np.array_equal(np.asarray(operation(image)), pixels & mask), f"{bits} bits"
            kept.add(bits)
        assert len(kept) >= 4 and (min(kept) <= 0 or operation.name == "PosterizeOriginal")


@dataclass(frozen=True)
class FailsOnDark:
    """An operation of another version of timm, which fails on some images; picklable, as workers need it."""

    def __call__(self, image, *level, **options):
        if np.asarray(image).mean() < 40:
            raise ValueError("the image is too dark")
        return image


@pytest.fixture
def failing(monkeypatch):
    """Every operation of every transform that is made fails on dark images; write_folder's first class is dark."""
    make = stream.make_transform

    def made(*arguments, **options):
        transform = make(*arguments, **options)
        for operation in transforms.operations(transform):
            operation.prob, operation.aug_fn = 1.0, FailsOnDark()
        return transform

    monkeypatch.setattr(stream, "make_transform", made)


TOLD = r"failed: \S*/ant/\d\.png with seed \d+ \(ValueError: the image is too dark\); another training.randaugment"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("skip", [False, True])
def test_what_an_augmentation_raises_is_told_with_image_and_seed(workers, skip, failing, tmp_path):
    """Also where images that cannot be read are passed over: this one can be read. The seed gives the same again."""
    settings = DataSettings(source="folder", folder=str(write_folder(tmp_path / "set")), skip_broken=skip)
    train, _ = load_data(settings, shape=(3, 16, 16), machine=MachineSettings(workers=workers))
    with pytest.raises(SettingsError, match=TOLD) as error:
        list(train.batches(Order(len(train), AUGMENTED, seed=1, steps=6)))
    assert "Traceback" not in str(error.value) and not train.broken
    with pytest.raises(SettingsError, match=TOLD):
        train.preview(1, AUGMENTED)


def test_images_that_cannot_be_brought_to_size_are_told_wherever_they_are_read(tmp_path, monkeypatch):
    write_folder(tmp_path / "set")
    train, eval_set = open_folder(tmp_path / "set")

    def too_dark(*_, **__):
        return FailsOnDark()

    monkeypatch.setattr(stream, "make_transform", too_dark)
    for read in (lambda: train.some(torch.arange(3)), lambda: train.preview(3), lambda: list(eval_set.eval_batches())):
        with pytest.raises(SettingsError, match=r"/ant/0\.png with seed 0 \(ValueError: the image is too dark\)"):
            read()


def test_an_augmentation_that_fails_ends_the_phase_in_a_line(failing, tmp_path, data_folder):
    write_folder(tmp_path / "set")
    (tmp_path / "mine.yaml").write_text(settings_file(tmp_path / "set"))
    with pytest.raises(SettingsError, match=TOLD):
        open_phase("meta", str(tmp_path / "mine.yaml"), [f"training.randaugment={RECIPES[0]}"]).run()
