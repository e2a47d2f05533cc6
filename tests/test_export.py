"""What is exported: which network is taken, and what its classes are called."""

import contextlib
import json
import re

import pytest
import sentences
import timm
import yaml
from layouts import write_fashion, write_folder, write_shards

from incubate_lib import tasks
from incubate_lib.cli import main
from incubate_lib.config import DataSettings, SettingsError, load_settings
from incubate_lib.data.sources import open_source
from incubate_lib.phases.classes import check_order
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.export import Finished, choose

OWN = {  # images of one's own, and the smallest network that can be taken apart
    "data": {"source": "folder", "folder": "pets", "in_memory": True},
    "model": {"name": "vit_tiny_patch16_224", "img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "partition": {"num_modules": 2},
    "training": {"epochs": 2, "batch_size": 8, "warmup_epochs": 0},
    "run": ["end_to_end", "random_modules", "deep_incubation"],
}


def test_export_says_what_is_finished_which_it_takes_and_why_and_names_the_classes(tmp_path, data_folder, capsys):
    names = ["ant", "bee", "große Katze"]
    write_folder(data_folder / "datasets" / "pets", names, size=(8, 8))
    file = tmp_path / "pets.yaml"
    file.write_text(yaml.safe_dump(OWN))
    settings = load_settings(str(file))
    plan(settings, ["end_to_end", "deep_incubation", "random_modules"], [0]).run()
    plan(settings, ["end_to_end"], [1]).run()

    out = tmp_path / "out"
    capsys.readouterr()
    assert main(["export", str(file), str(out)]) == 0  # `run` has random_modules before deep_incubation, the table has not
    head, *lines = capsys.readouterr().out.splitlines()
    accuracies = {
        key: final.summary()["score"] for key, final in plan(settings, settings.run, [0, 1]).finals.items() if final.summary()
    }
    assert head == "finished, with top-1 on the test split:"
    order = [("end_to_end", 0), ("end_to_end", 1), ("random_modules", 0), ("deep_incubation", 0)]
    assert lines[:4] == [f"  {name}, seed {seed}: {100 * accuracies[name, seed]:.2f} %" for name, seed in order]
    assert lines[4].startswith(f"taken: {lines[2].strip()}, {sentences.FIRST_OF_RUN}")
    assert lines[5].startswith("wrote strategy random_modules, seed 0")

    config = json.loads((out / "config.json").read_text())
    assert config["label_names"] == names and config["num_classes"] == 3
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert list(model.pretrained_cfg["label_names"]) == names
    card = (out / "README.md").read_text()
    assert all(name in card for name in names)
    snippet = re.search("## Use\n\n```python\n(.*?)```", card, re.S)[1]
    with contextlib.chdir(out):  # as the card says
        exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() in names, "pasted, it predicts one image"
    for name, seed in order:
        this = " (this one)" if (name, seed) == ("random_modules", 0) else ""
        assert f"| {name}{this} | {seed} | {100 * accuracies[name, seed]:.2f} % |" in card

    plan(settings, ["random_modules"]).finals["random_modules", 0].folder.weights.unlink()  # it cannot be exported any more
    assert main(["export", str(file), str(tmp_path / "next")]) == 0
    output = capsys.readouterr().out
    assert "random_modules" not in output and "wrote strategy deep_incubation, seed 0" in output

    # and as weights to start from: what has the same names must have the same order
    raw = OWN | {"strategies": {"again": {"kind": "finetune", "weights": str(out)}}, "run": ["again"]}
    file.write_text(yaml.safe_dump(raw))
    assert plan(load_settings(str(file))).nodes
    (out / "config.json").write_text(json.dumps(config | {"label_names": ["bee", "ant", "große Katze"]}))
    with pytest.raises(SettingsError, match=f"strategies.again.weights: .* class 'bee' {sentences.other_class(0, 1)}"):
        plan(load_settings(str(file), ["name=other"]))
    (out / "config.json").write_text(json.dumps(config | {"label_names": ["0", "1", "2"]}))  # numbers say nothing of words
    assert plan(load_settings(str(file), ["name=other"])).nodes


@pytest.mark.parametrize(
    ("taken", "others", "why"),
    [
        ({}, {"end_to_end": 0.5}, sentences.FIRST_OF_RUN),
        ({}, {"end_to_end": 0.73}, f"{sentences.FIRST_OF_RUN}; end_to_end is 13.00 points better on this data "
                                   "(--strategy end_to_end takes it)"),
        ({"strategy": "growing"}, {"end_to_end": 0.5}, "as --strategy says"),
        ({}, {}, "the only finished one of this seed"),
    ],
)  # fmt: skip
def test_a_better_network_is_not_passed_over_silently(taken, others, why):
    ready = [Finished(name, 0, accuracy, tasks.get().score, None) for name, accuracy in {**others, "growing": 0.6}.items()]
    found, output = choose(load_settings("smoke"), ready, **({"strategy": None, "seed": 0} | taken))
    assert found.strategy == "growing" and output.endswith(why)


def test_classes_have_the_names_of_their_source(tmp_path, data_folder):
    write_fashion(tmp_path / "fashion", zipped=True)
    write_shards(tmp_path / "wds")
    for settings, count, first in [
        (DataSettings(source="digits"), 10, "0"),
        (DataSettings(source="fashion_mnist", folder=str(tmp_path / "fashion")), 10, "T-shirt/top"),
        (DataSettings(source="wds/", folder=str(tmp_path / "wds")), 3, "0"),
        (DataSettings(num_classes=4, source="synthetic"), 4, "pattern 0"),
    ]:
        names = open_source(settings)[0].classes
        assert len(names) == len(set(names)) == count and names[0] == first


def test_a_name_of_two_classes_says_nothing_about_their_order():
    birds = ["crane", "swan", "ox", "crane"]
    check_order(birds, birds, "weights")
    check_order(birds, ["bird", "swan", "ox", "crane"], "weights")
    for other in (["crane", "ox", "swan", "crane"], ["ox", "swan", "crane", "crane"]):
        with pytest.raises(SettingsError, match=r"class '\w+' " + sentences.other_class(r"\d", r"\d")):
            check_order(birds, other, "weights")
