"""A preset made small enough to be trained in seconds, and its images on disk as a user has them."""

import json
from typing import Any

import numpy as np
import yaml
from bad.texts import tokenizer
from layouts import cifar_files, picture, write_fashion
from torchvision import datasets

from incubate_lib.config import load_settings, presets

BATCH, MICRO, EPOCHS = 4, 2, 2
PER_MODULE = 2  # blocks of a target module, so that it is still deeper than the meta module
STAGES = {  # of networks whose depth is that of their stages: as deep as can be, and where they are cut then
    "cifar_resnet110": ({"options": {"layers": [2, 2, 2], "channels": [8, 8, 16]}}, ["layer1.1", "layer2.1"]),
    "cifar_resnet20": ({"options": {"channels": [8, 8, 16]}}, ["layer1.2", "layer2.2"]),
    "swin_tiny_patch4_window7_224": ({"embed_dim": 8}, ["layers.0", "layers.1", "layers.2"]),
    "convnext_atto": ({}, ["stages.0", "stages.1", "stages.2"]),
}
IMAGES = {  # how many, where a preset says so; what lies on disk is small anyway
    "digits": {"test_images": 1700},  # of 1,797
    "synthetic": {"num_images": 144, "test_images": 48},
    "fashion_mnist": {"train_share": 1.0, "test_images": 20},
    "digit_boxes": {"num_images": 8, "test_images": 4},
    "digit_maps": {"num_images": 8, "test_images": 4},
}

CORPORA = {"austen": {"source": "text", "folder": "austen"}}  # thousands of contexts otherwise


def shrunk(name: str) -> dict[str, Any]:
    """Return a preset's file with width, depth, batch, images and epochs shrunk, and nothing else but torch.compile left out.

    Learning rates at their peak stay, because the batch that they are meant for shrinks with the batch. To compile each
    phase's network would take minutes on a CPU, and no result is to depend on it.
    """
    tree = yaml.safe_load(presets()[name].read_text())
    settings, recipe = load_settings(name), tree["training"]
    if settings.model.name in STAGES:
        model, cuts = STAGES[settings.model.name]
        tree["model"] |= model
        tree["partition"] |= {"cuts": cuts} if "cuts" in tree["partition"] else {}
    elif partition := tree.get("partition"):
        modules = len(partition.get("target_depths", ())) or partition["num_modules"]
        tree["model"] |= {"embed_dim": 16, "num_heads": 2, "depth": PER_MODULE * modules}
        if "target_depths" in partition:
            partition["target_depths"] = [PER_MODULE] * modules
    elif settings.task != "classification":  # a network on top of a transformer
        tree["model"] |= {"embed_dim": 16, "num_heads": 2, "depth": PER_MODULE}
    if "lr_for_batch" in recipe:
        recipe["lr_for_batch"] = recipe["lr_for_batch"] * BATCH // recipe["batch_size"]
    if "micro_batch" in recipe:
        recipe["micro_batch"] = MICRO
    recipe["batch_size"] = BATCH
    if "recipe" in recipe:  # which has the draws of a large batch
        recipe["mixup_draws"] = BATCH // MICRO
    tree["data"] |= CORPORA.get(settings.data.source, {})
    tree["data"] |= {field: value for field, value in IMAGES.get(settings.data.source, {}).items() if field in tree["data"]}
    if "compile" in tree.get("machine", {}):
        tree["machine"]["compile"] = "off"
    _shorten(tree)
    return tree


def _shorten(tree: dict[str, Any]) -> None:
    """Shorten everything in a settings file that is counted in epochs: to two, and what is a part of them to half a one; and
    have as many draws of mixup as micro-batches."""
    for key, value in tree.items():
        if isinstance(value, dict):
            _shorten(value)
        elif key == "mixup_draws":
            tree[key] = BATCH // MICRO
        elif key.endswith("epochs"):
            tree[key] = EPOCHS if key == "epochs" else min(value, 0.5)


def write_images(name: str, folder) -> dict[str, str]:
    """Write a preset's images into a data folder, in the layout of the real ones; return what the environment needs besides."""
    source, own = load_settings(name).data.source, load_settings(name).data.folder
    if source == "folder":
        write_imagenet(folder / "datasets" / "imagenet")
    elif source in ("austen", "wikitext"):
        write_texts(folder / "datasets" / (own or source), source)
    elif source == "fashion_mnist":
        write_fashion(folder / "datasets" / source, zipped=False)
    elif source.startswith("cifar"):
        sums = cifar_files(folder / "datasets" / source, {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[source])
        (folder / "cifar.json").write_text(json.dumps(sums))
        return {"TEST_CIFAR": str(folder / "cifar.json")}  # hooks/sitecustomize.py
    return {}


def write_texts(place, source) -> None:
    """A few pages of words: chapters, or WikiText's three files with a vocabulary of words beside them."""
    words = ["the", "a", "it", "is", "was", "novel", "truth", "of", "and", "."]
    pages = [" ".join(words[(i * j) % 10] for j in range(1, 60)) for i in range(1, 31)]
    place.mkdir(parents=True)
    for i, text in enumerate(pages if source == "austen" else []):
        (place / f"{i:02}.txt").write_text(text)
    for split in ("train", "valid", "test") if source == "wikitext" else ():
        (place / f"wiki.{split}.tokens").write_text("".join(f" = {i} = \n\n {text} \n\n" for i, text in enumerate(pages)))
    (place / "tokenizer.json").write_text(tokenizer("[UNK]", "[SEP]", "[MASK]", *words))


def write_imagenet(root, classes=("n01440764", "n01443537", "n02119789", "n15075141"), train=2, val=1):
    """ImageNet as it is usually kept: JPEGs of all sizes, most of them colour, one grey and one CMYK, as there."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        for split, number, file in (("train", train, f"{name}_{{}}.JPEG"), ("val", val, "ILSVRC2012_val_{:08}.JPEG")):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                size = tuple(int(n) for n in rng.integers(40, 120, 2))
                mode = {0: "L", 1: "CMYK"}[i] if (split, label) == ("train", 0) else "RGB"
                picture(label, size).convert(mode).save(root / split / name / file.format(100 * label + i))
