"""Images in memory: splits, normalisation, augmentation."""

from pathlib import Path

import numpy as np
import pytest
import sklearn
import torch
from networks import image_set

from incubate_lib.config import DataSettings, SettingsError, TrainingSettings, load_settings
from incubate_lib.data.sets import augment, load_data, shift


def rows(*sets):
    """Return the images of some sets as a sorted list of bytes, to be compared as multisets."""
    return sorted(image.numpy().tobytes() for data in sets for image in data.images)


def test_splits_are_class_balanced_and_apart():
    """As multisets, because the source holds some pictures twice: nothing is lost, nothing stands in two splits."""
    train, test = load_data(load_settings("digits").data)
    smaller, val = load_data(load_settings("digits", ["data.eval_split=val"]).data)
    assert (len(train), len(test), len(smaller), len(val)) == (1200, 597, 1000, 200)
    assert rows(smaller, val) == rows(train), "validation images come from the training images only"
    table = np.loadtxt(Path(sklearn.__file__).parent / "datasets/data/digits.csv.gz", delimiter=",")
    assert len(rows(train, test)) == len(table) == 1797
    totals = sorted(int(image.sum()) for data in (train, test) for image in data.images)
    assert totals == sorted(int((row * (255 / 16)).round().sum()) for row in table[:, :-1])
    for part, rest in ((test, train), (val, smaller)):
        share = part.labels.bincount() / rest.labels.bincount()
        assert share.max() / share.min() < 1.15


def test_images_are_normalised_by_the_training_images():
    train, _ = load_data(DataSettings())
    x = train.normalise(train.images)
    assert abs(x.mean().item()) < 1e-3 and x.std().item() == pytest.approx(1, abs=1e-2)
    assert train.images.dtype == torch.uint8 and train.images.shape[1:] == (1, 8, 8)


@pytest.mark.parametrize("settings", [{"test_images": 1795}, {"test_images": 3}, {"eval_split": "val", "val_images": 1199}])
def test_splits_that_cannot_be_cut_are_refused(settings):
    with pytest.raises(SettingsError, match=r"data\.(test|val)_images is"):
        load_data(DataSettings(**settings))


def test_shift_moves_each_image_as_a_whole():
    torch.manual_seed(0)
    images = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 3, 4] = 255
    places = shift(images, 1).flatten(1).argmax(1)
    assert shift(images, 1).flatten(1).sum(1).eq(255).all()
    assert set(places.tolist()) == {8 * r + c for r in (2, 3, 4) for c in (3, 4, 5)}


def test_augmentation_that_is_off_changes_nothing():
    images = image_set().images
    assert torch.equal(augment(images, TrainingSettings()), images)
    flipped = augment(images, TrainingSettings(hflip=True))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all() and same.any() and mirrored.any()
