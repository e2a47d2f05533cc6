"""Downstream: the metrics of the field, the layouts of COCO and ADE20K, encoders that carry over bit by bit, resumed runs."""

import contextlib
import io
import json

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from incubate_lib.config import DataSettings, ModelSettings, SettingsError, TrainingSettings, load_settings
from incubate_lib.config.members import TASKS
from incubate_lib.data.scenes.digits import scenes, write
from incubate_lib.data.scenes.masks import bounds, decode, encode
from incubate_lib.data.scenes.views import Seen, view
from incubate_lib.data.sets import load_data
from incubate_lib.downstream.precision import average_precision
from incubate_lib.phases.networks import build_for, build_model
from incubate_lib.phases.weights import load_into
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.export import export
from incubate_lib.report.live.scenes import scene_figure
from incubate_lib.report.tables.verdict import against_baseline
from incubate_lib.training.loop import evaluate
from incubate_lib.training.runs import Stopped
from incubate_lib.training.trainer import Trainer, make_optimizer

HOW = {"num_images": 8, "test_images": 4, "image_size": 32, "num_classes": 3}
TINY = {
    "name": "vit_tiny_patch16_224",
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "in_chans": 1,
}
SMALL = [f"data.{key}={value}" for key, value in HOW.items()] + [
    f"model.{key}={value}" for key, value in TINY.items() if key != "name"
] + ["training.batch_size=2", "training.epochs=2", "training.eval_every=1", "run=[from_nothing]",
     "strategies={from_nothing: {kind: end_to_end}}"]  # fmt: skip
PUBLISHED = ("coco-vit-b-1x", "coco-vit-b-3x", "ade20k-vit-l", "ade20k-vit-h")


def sets(source, **more):
    return load_data(DataSettings(source=source, **(HOW | more)), shape=(1, 32, 32))


# -- metrics --------------------------------------------------------------------------------------------------------------------


def shown(number=6):
    """Return entries of COCO with their objects, as sources give them."""
    _, coco, _ = scenes(number, 64, 3, 0, "val")
    objects = {image["id"]: [] for image in coco["images"]}
    for one in coco["annotations"]:
        objects[one["image_id"]].append(one | {"label": one["category_id"]})
    return [image | {"objects": objects[image["id"]]} for image in coco["images"]], coco


def test_the_truth_as_prediction_has_average_precision_one_and_nothing_has_none():
    truths, _ = shown()
    found = [
        {"truth": truth, "found": [{key: one[key] for key in ("label", "bbox", "segmentation")} | {"score": 0.9}
                                   for one in truth["objects"]]} for truth in truths
    ]  # fmt: skip
    assert set(average_precision(found).values()) == {1.0}
    assert set(average_precision([one | {"found": []} for one in found]).values()) == {0.0}
    for image in found:
        for one in image["truth"]["objects"]:
            one["id"] -= min(other["id"] for every in found for other in every["truth"]["objects"])
    assert set(average_precision(found).values()) == {1.0}, "objects counted from 0"


def test_average_precision_is_pycocotools_own():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truths, coco = shown(12)
    rng, images, results = np.random.default_rng(0), [], []
    for truth in truths:
        found = []
        for one in truth["objects"]:
            moved = np.roll(decode(one["segmentation"], 64, 64), rng.integers(-3, 4, 2), (0, 1))
            label = one["label"] if rng.random() < 0.8 else 1 + one["label"] % 3
            found.append({"label": label, "score": float(rng.random()), "bbox": bounds(moved), "segmentation": encode(moved)})
        images.append({"truth": truth, "found": found})
        results += [{"image_id": truth["id"], "category_id": one["label"], **one} for one in found]
    ours = average_precision(images)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO()
        theirs.dataset = coco
        theirs.createIndex()
        detections = theirs.loadRes([{k: v for k, v in one.items() if k != "label"} for one in results])
        for name, kind in (("box", "bbox"), ("mask", "segm")):
            evaluation = COCOeval(theirs, detections, kind)
            for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
                step()
            assert (ours[f"{name}_ap"], ours[f"{name}_ap50"]) == tuple(evaluation.stats[:2])
    assert 0.05 < ours["box_ap"] < 0.95


def test_mean_iou_is_a_brute_force_count_without_unlabelled_pixels():
    task, generator = TASKS["segmentation"], torch.Generator().manual_seed(0)
    maps = torch.randint(0, 4, (3, 20, 20), generator=generator)
    scores = torch.randn(3, 5, 20, 20, generator=generator)  # class 4 is said, but never true
    maps[:, :5] = 255
    seen = [Seen(one.numpy().astype(np.uint8), (20, 20), ((0, 0),)) for one in maps]
    measured = task.evaluated(task.sums(scores, (scores, seen)).tolist())
    said, ious = scores.argmax(1), []
    for c in range(5):
        pairs = [(int(t), int(p)) for t, p in zip(maps.flatten(), said.flatten(), strict=True) if t != 255]
        both = sum(t == c and p == c for t, p in pairs)
        ious.append(both / sum(t == c or p == c for t, p in pairs))
    assert measured["score"] == pytest.approx(sum(ious) / 5)
    perfect = torch.nn.functional.one_hot(maps.clamp(max=4), 5).permute(0, 3, 1, 2).float()
    assert task.evaluated(task.sums(perfect, (perfect, seen)).tolist())["score"] == 1.0


def test_sliding_squares_cover_an_image_and_are_averaged():
    image = Image.fromarray(np.arange(40 * 100, dtype=np.uint16).reshape(40, 100).astype(np.uint8))
    truth = np.zeros((40, 100), np.uint8)
    squares, seen = view(image, truth, 40, None)
    assert seen.size == (40, 100) and seen.places == ((0, 0), (0, 26), (0, 52), (0, 60))
    assert all(torch.equal(square[0], torch.from_numpy(np.asarray(image))[:, left : left + 40])
               for square, (_, left) in zip(squares, seen.places, strict=True))  # fmt: skip
    constant = torch.zeros(4, 2, 40, 40)
    constant[:, 0], constant[3] = 1.0, torch.tensor([0.0, 9.0])[:, None, None]  # only the last says class 1, and loudest
    sums = TASKS["segmentation"].sums(constant, (squares, [seen])).tolist()
    assert sums[2:5] == [4000, 4000 - 40 * 40, 4000 - 40 * 40]  # of class 0: true, said, both


# -- layouts --------------------------------------------------------------------------------------------------------------------


def test_scenes_are_the_same_for_a_seed_and_from_files_in_both_layouts(data_folder):
    folder = data_folder / "datasets" / "mine"
    write(folder, 4, 32, 3, 0, {"val": "val"})
    write(folder, 8, 32, 3, 0, {"train": "train"})
    for source, made in (("coco", "digit_boxes"), ("ade20k", "digit_maps")):
        more = {"num_classes": 4} if source == "ade20k" else {}
        files = load_data(DataSettings(source=source, folder="mine", **more), shape=(1, 32, 32))
        for read, own in zip(files, sets(made), strict=True):
            assert len(read) == len(own) and read.num_classes == own.num_classes == 3 + (source == "ade20k")
            (x, seen), (y, same) = (part.some(torch.arange(4)) for part in (read, own))
            assert torch.equal(x, y) and str(seen) == str(same)
    other = load_data(DataSettings(source="digit_maps", **HOW, split_seed=1), shape=(1, 32, 32))
    assert not torch.equal(other[0].some(torch.arange(4))[0], sets("digit_maps")[0].some(torch.arange(4))[0])


def test_boxes_are_those_of_masks_however_an_image_is_cropped_and_mirrored():
    images, coco, _ = scenes(4, 64, 3, 0, "train")
    recipe = TrainingSettings(hflip=True, scale=(0.8, 1.5))
    for image, entry in zip(images, coco["images"], strict=True):
        objects = [one | {"label": one["category_id"]} for one in coco["annotations"] if one["image_id"] == entry["id"]]
        for _ in range(5):
            _, seen = view(Image.fromarray(image), entry | {"objects": objects}, 64, recipe)
            assert len(seen["boxes"]) == len(seen["labels"]) == len(seen["masks"])
            for (left, top, right, bottom), mask in zip(seen["boxes"], seen["masks"], strict=True):
                rows, columns = np.nonzero(decode(mask, 64, 64))
                ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert np.abs(np.array([left, top, right, bottom]) - ends).max() <= 2.0  # of interpolation


# -- what carries over ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_an_encoder_carries_over_bit_by_bit_and_its_classifier_does_not(task, tmp_path):
    model = ModelSettings(**TINY)
    save_file(build_model(model, 2, 10).state_dict(), tmp_path / "encoder.safetensors")
    network = load_into(build_for(task, model, 2, 3), tmp_path / "encoder.safetensors")
    given, own = load_file(tmp_path / "encoder.safetensors"), network.backbone.state_dict()
    assert given.keys() - own.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(given[name], tensor) for name, tensor in own.items())
    larger = model.model_copy(update={"img_size": 48})
    resampled = load_into(build_for(task, larger, 2, 3), tmp_path / "encoder.safetensors").backbone
    assert resampled.pos_embed.shape[1] == 145 and torch.equal(resampled.blocks[0].mlp.fc1.weight, own["blocks.0.mlp.fc1.weight"])


def test_the_rate_falls_layer_by_layer_and_is_whole_on_top():
    network = build_for("segmentation", ModelSettings(**TINY), 2, 3)
    optimizer = make_optimizer(network, TrainingSettings(layer_decay=0.5))
    scale = {id(p): group.get("lr_scale", 1.0) for group in optimizer.param_groups for p in group["params"]}
    named = {name: scale[id(p)] for name, p in network.named_parameters() if p.requires_grad}
    parts = ("backbone.patch_embed", "blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight", "classify.weight")
    found = [next(value for name, value in named.items() if part in name) for part in parts]
    assert found == [0.25, 0.5, 1.0, 1.0] and len(named) == len(scale)
    for token_decays in (False, True):
        optimizer = make_optimizer(network, TrainingSettings(layer_decay=0.5, decay_tokens=token_decays))
        decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        assert (id(network.pyramid.backbone.pos_embed) in decayed) is token_decays


def test_a_run_starts_from_the_network_of_its_own_seed(data_folder):
    tiny = ["model.embed_dim=16", "model.depth=3", "model.num_heads=2", "training.eval_every=1", "training.warmup_epochs=0"]
    short = ["data.test_images=1700", "strategies.end_to_end.phases.end_to_end.epochs=1"]
    before = plan(load_settings("scenes-networks", [*tiny, *short]), ["end_to_end"], [3]).finals["end_to_end", 3]
    before.run()
    small = [line for line in SMALL if not line.startswith(("strategies", "run", "model"))]
    settings = load_settings("scenes-segmentation", [*tiny, *small, "model.img_size=32"])
    todo = plan(settings, ["from_end_to_end"], [3])
    node = todo.finals["from_end_to_end", 3]
    assert node.settings.inputs == {"weights": before.summary()["weights_sha256"]}
    todo.run()
    assert node.summary()["score"] > 0
    with pytest.raises(SettingsError, match="seed-4"):
        plan(settings, ["from_end_to_end"], [4])
    exported = data_folder / "mine"
    assert export(settings, exported, strategy="from_end_to_end", seed=3) == "from_end_to_end"
    backbone = timm.create_model(f"local-dir:{exported}", pretrained=True)
    trained = load_file(node.folder.weights)
    assert all(torch.equal(trained[f"pyramid.backbone.{name}"], tensor) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_run_that_was_stopped_ends_in_the_same_bits(task, data_folder, monkeypatch):
    from incubate_lib.phases import train

    def run():
        node = plan(load_settings(f"scenes-{task}", SMALL)).finals["from_nothing", 0]
        node.run()
        return node

    whole = run()
    bits, curve = load_file(whole.folder.weights), [row["score"] for row in whole.folder.metrics()]
    monkeypatch.setenv("INCUBATE_DATA", str(data_folder.parent / "other"))
    asked = iter([False, True])
    monkeypatch.setattr(train, "_stop_asked", lambda files: lambda: next(asked, False))
    monkeypatch.setattr("incubate_lib.training.loop.STATUS_SECONDS", 0)
    with contextlib.suppress(Stopped, SystemExit):
        run()
    monkeypatch.undo()
    monkeypatch.setenv("INCUBATE_DATA", str(data_folder.parent / "other"))
    again = run()
    assert again.folder.status()["resumed_at"] > 0
    assert all(torch.equal(tensor, bits[name]) for name, tensor in load_file(again.folder.weights).items())
    assert [row["score"] for row in again.folder.metrics()] == curve
    drawn = scene_figure({"said": again}, 3).axes
    shown = len(again.data()[1].some(torch.arange(1))[1][0].truth.get("objects", ())) if task == "detection" else 1
    assert [axis.get_title("left") for axis in drawn[::3]] == ["image", "what it shows", "said"]
    assert [len(axis.images) for axis in drawn[:4:3]] == [1, 1 + shown]  # what covers the image


def test_starts_are_compared_with_that_from_end_to_end():
    """Whatever they are of: the report's sentences and the table of a study say it."""
    means = {"nothing": 0.4, "end_to_end": 0.5, "growing": 0.52}
    rows = [{"strategy": f"from_{name}", "seed": seed, "metric": "mean_iou", "score": mean + 0.01 * seed, "flops": 2.0,
             "critical_flops": 2.0} for name, mean in means.items() for seed in (0, 1, 2)]  # fmt: skip
    nothing, grown, _ = against_baseline(pd.DataFrame(rows))
    assert nothing.startswith("from nothing: 10.0 points worse than from end to end's network")
    assert grown.startswith("from growing's network: 2.0 points better than from end to end's network")


# -- published recipes ----------------------------------------------------------------------------------------------------------


def pictures(folder, preset):
    """Write three images of different sizes in the layout of a preset's data."""
    rng, settings = np.random.default_rng(0), load_settings(preset).data
    sizes = [(80, 60), (60, 90), (64, 64)]
    for split in (settings.train_split, settings.test_split):
        coco = settings.source == "coco"
        place = folder / split if coco else folder / "images" / split
        place.mkdir(parents=True)
        (folder / "annotations" / ("" if coco else split)).mkdir(parents=True, exist_ok=True)
        entries, objects = [], []
        for i, size in enumerate(sizes):
            Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(place / f"{i:012}.jpg")
            entries.append({"id": 100 + i, "width": size[0], "height": size[1], "file_name": f"{i:012}.jpg"})
            square = [[10.0, 10, 40, 10, 40, 40, 10, 40]]
            objects.append({"id": 7 + i, "image_id": 100 + i, "category_id": 3, "bbox": [10, 10, 30, 30], "area": 900.0,
                            "segmentation": square, "iscrowd": 0})  # fmt: skip
            if not coco:
                Image.fromarray(rng.integers(0, 151, size[::-1], np.uint8)).save(folder / "annotations" / split / f"{i:012}.png")
        if coco:
            read = {
                "images": entries,
                "annotations": objects,
                "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}],
            }
            (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(read))


@pytest.mark.parametrize("preset", ["coco-vit-b-3x", "ade20k-vit-l"])
def test_a_published_preset_does_an_update_at_its_size_on_data_in_its_layout(preset, data_folder):
    settings = load_settings(preset, ["model.embed_dim=16", "model.num_heads=2", "model.depth=2", "machine.workers=0"])
    pictures(data_folder / "datasets" / settings.data.folder, preset)
    size, task = settings.model.img_size, TASKS[settings.task]
    train, held = load_data(settings.data, shape=(3, size, size), machine=settings.machine)
    network = build_for(settings.task, settings.model, 2, task.outputs(train))
    recipe = settings.training.model_copy(update={"batch_size": 1, "micro_batch": None, "epochs": 0.34})
    before = network.backbone.blocks[0].mlp.fc1.weight.clone()
    trainer = Trainer(network, train, recipe, seed=0, task=task, machine=settings.machine)
    network.train()
    trainer.begin(0)
    assert trainer.steps == 1 and trainer.step(0).isfinite()
    assert not torch.equal(before, network.backbone.blocks[0].mlp.fc1.weight)
    assert 0 <= evaluate(network, held, task=task)["score"] <= 1


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_network_is_counted_and_run_on_the_meta_device(preset):
    settings = load_settings(preset)
    classes = 80 if settings.task == "detection" else settings.data.num_classes
    size, images = settings.model.img_size, {"detection": 117_266, "segmentation": 20_210}[settings.task]
    with torch.device("meta"):
        network = build_for(settings.task, settings.model, settings.model.depth, classes)
        output = network.train()(torch.empty(1, 3, size, size))
    weights = sum(parameter.numel() for parameter in network.parameters())
    backbone = {"b": 86e6, "l": 304e6, "h": 632e6}[preset.split("-")[2]]
    assert backbone < weights < backbone + 60e6
    if settings.task == "segmentation":
        assert output.shape == (1, 150, size, size)
    else:
        assert output["boxes"][0].shape == (512, 81) and output["masks"].shape == (128, 81, 28, 28)
    updates = settings.training.epochs * (images // settings.training.batch_size)
    assert updates == pytest.approx({"1": 90_000, "3": 270_000}.get(preset[-2], 80_000), rel=0.03)
