"""How many images there are to train on, and in how many classes, before any of them is opened; of text contexts and tokens."""

from dataclasses import dataclass

import numpy as np

from incubate_lib.config import DEFAULT_MACHINE, DataSettings, MachineSettings, SettingsError, check_numbers
from incubate_lib.data.folders import Source, place_of
from incubate_lib.data.sets import load_data, splits, unused_classes, unused_in_words
from incubate_lib.data.sources import open_source

IMAGENET = (1_281_167, 50_000, 1000)  # images to train on, to evaluate on (None: one pool for both), classes
KNOWN = {
    "coco": (117_266, 5_000, 80),  # that show an object
    "ade20k": (20_210, 2_000, 150),
    "digits": (1797, None, 10), "fashion_mnist": (60_000, 10_000, 10), "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
}  # fmt: skip
# words to train on, of WikiText as its page states them, by a part of the folder's name; and BERT's tokens
WIKITEXT, BERT_TOKENS = {"103": 103_227_021, "": 2_088_628}, 30_522


@dataclass(frozen=True)
class Images:
    """Number of images to train on, before `data.train_share`, and of their classes."""

    count: int
    num_classes: int
    sentence: str  # a sentence: the numbers, and how they are known
    assumed: bool = False  # because there is no folder to count
    mask_share: float | None = None
    tokens: int | None = None  # of a context of text
    characters: float | None = None  # for which these stand, on average; where the text was read

    @property
    def is_text(self) -> bool:
        return self.tokens is not None


def count_images(
    settings: DataSettings,
    machine: MachineSettings = DEFAULT_MACHINE,
    *,
    images: int | None = None,
    classes: int | None = None,
    shape: tuple[int, ...] = (),
) -> Images:
    """Return the given numbers, those of a known set, or those of the folder; ImageNet-1K's, and that, where it is not there.

    What a run would train on: images that `data.test_images` and `data.val_images` take from the training images are not
    counted. Image files are listed; of shards the heads and labels are read, of Hugging Face's tables the labels. No image is
    opened, nothing is downloaded. SettingsError for a folder that is there and wrong. Text is read, and counted in contexts of
    the network's `shape`.
    """
    check_numbers({"images": images, "classes": classes})
    if settings.is_text:
        return _count_contexts(settings, machine, images, classes, shape)
    share = "" if settings.train_share == 1 else f" Of these images a share of {settings.train_share:g} (data.train_share)."
    if images and classes:
        return Images(images, classes, f"{_in_words(images, classes)}, as given.{share}")
    train, test, how, assumed = _sources(settings, machine)
    source, index = splits(settings.model_copy(update={"train_share": 1.0}), train, test)[0]
    found = len(train.classes)
    unused = unused_in_words(unused_classes(source.labels[index], found), found)
    given = " (images as given)" if images else " (classes as given)" if classes else ""
    sentence = f"{_in_words(images or len(index), classes or found)}{given}, {how}.{share} {unused}".strip()
    return Images(images or len(index), classes or found, f"ASSUMED: {sentence}" if assumed else sentence, assumed)


def _count_contexts(
    settings: DataSettings, machine: MachineSettings, images: int | None, classes: int | None, shape: tuple[int, ...]
) -> Images:
    place, words, characters = place_of(settings, machine), f"counted in {settings.source}", None
    if not (images and classes):
        try:
            train = load_data(settings.model_copy(update={"train_share": 1.0}), shape=shape, machine=machine)[0]
            images, classes, characters = images or len(train), classes or train.num_classes, train.characters
        except SettingsError as error:
            if settings.source != "wikitext" or place.exists():
                raise
            known = next(number for part, number in WIKITEXT.items() if part in place.name)
            images, classes = images or known // shape[0], classes or BERT_TOKENS
            words = f"those of WikiText, because {error}; --images and --classes say others"
    sentence = f"{images:,} contexts of {shape[0]} tokens to train on, {classes:,} different tokens, {words}"
    is_assumed = words.startswith("those")
    told = f"ASSUMED: {sentence}" if is_assumed else sentence
    return Images(images, classes, told, is_assumed, settings.mask_share, shape[0], characters)


def _in_words(images: int, classes: int) -> str:
    return f"{images:,} images to train on in {classes:,} classes"


def _sources(settings: DataSettings, machine: MachineSettings) -> tuple[Source, Source | None, str, bool]:
    """Return training and test images, of which only labels count, where the numbers are from, and whether that is a guess."""
    made = {"synthetic": (settings.num_images, None, settings.num_classes)}
    for source, background in (("digit_boxes", 0), ("digit_maps", 1)):
        made[source] = (settings.num_images, settings.test_images, settings.num_classes + background)
    if sizes := (KNOWN | made).get(settings.source.removeprefix("torch/")):
        return *_like(*sizes), f"those of {settings.source}", False
    place, is_cached = place_of(settings, machine), settings.source.startswith("hfds/")
    try:
        opened = open_source(settings, machine.model_copy(update={"download": False}))
        return *opened, f"counted in {place if place.exists() else settings.source}", False
    except SettingsError as error:
        if place.exists() and not is_cached:
            raise
        why = str(error) if is_cached else f"data.folder {place} is not there"
        return *_like(*IMAGENET), f"those of ImageNet-1K, because {why}; --images and --classes say others", True


def _like(train: int, test: int | None, classes: int) -> tuple[Source, Source | None]:
    """Return as many labels, every class equally often."""
    names = list(map(str, range(classes)))
    return tuple(None if count is None else Source(np.arange(count) % classes, names) for count in (train, test))
