"""What is finished is used again wherever the same is asked for, and nowhere else."""

import shutil

import pytest

from incubate_lib.config import SettingsError, load_settings
from incubate_lib.phases import train as phases
from incubate_lib.phases.job import read_job
from incubate_lib.pipeline.strategies import open_phase, plan


def test_finished_phases_are_only_read(data_folder, monkeypatch):
    node = open_phase("meta", "smoke")
    first = node.run()
    files = {p: p.stat().st_mtime_ns for p in node.folder.path.iterdir()}
    monkeypatch.setattr("incubate_lib.phases.train.fit", lambda *a, **k: pytest.fail("trained again"))
    assert open_phase("meta", "smoke").run() == first
    assert {p: p.stat().st_mtime_ns for p in node.folder.path.iterdir()} == files


def test_changed_settings_get_phases_of_their_own_and_share_what_is_the_same(data_folder, monkeypatch):
    original = open_phase("incubate", "smoke", module_index=1)
    original.run()
    before = {p: p.read_bytes() for p in data_folder.rglob("*") if p.is_file()}
    changed = open_phase("incubate", "smoke", ["phases.incubate.lr=1e-3"], module_index=1)
    assert changed.experiment.path == original.experiment.path and changed.folder.path != original.folder.path
    assert changed.inputs["meta"].folder.path == original.inputs["meta"].folder.path
    trained = []
    original_fit = phases.fit
    monkeypatch.setattr(phases, "fit", lambda *a, **k: trained.append(k["title"]) or original_fit(*a, **k))
    changed.run()
    assert len(trained) == 1 and "module 2" in trained[0]  # the meta model was not trained again
    record = original.experiment.path / "run.json"
    assert (record.with_name("run.1.json")).read_bytes() == before.pop(record), "what the name meant before is kept"
    assert changed.experiment.is_present() and original.experiment.is_known() and not original.experiment.is_present()
    assert {p: p.read_bytes() for p in before} == before


def test_another_fine_tuning_starts_from_everything_before_it(data_folder, monkeypatch):
    assembled = open_phase("assemble", "smoke")
    assembled.run()
    trained, original_fit = [], phases.fit
    monkeypatch.setattr(phases, "fit", lambda *a, **k: trained.append(k["title"]) or original_fit(*a, **k))
    node = open_phase("finetune", "smoke", ["phases.finetune.epochs=1"])
    assert node.run()["steps"] == 12
    assert trained == ["seed 0 finetune, deep_incubation"]
    assert node.summary()["inputs_sha256"] == {"assemble": assembled.summary()["weights_sha256"]}


def test_an_edited_file_never_reuses_the_old_results(data_folder, tmp_path):
    text = "name: mine\npartition: {num_modules: 2}\n"
    text += "model: {img_size: 8, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, in_chans: 1}\n"
    text += "data: {source: synthetic, test_images: 96}\ntraining: {epochs: 1, batch_size: 16, lr: LR}\n"
    summaries = []
    for lr in ("1e-3", "2e-3", "1e-3"):
        (tmp_path / "mine.yaml").write_text(text.replace("LR", lr))
        node = open_phase("meta", str(tmp_path / "mine.yaml"))
        summaries.append((node.run()["weights_sha256"], node.folder.path))
        assert node.experiment.path.name == "mine" and node.experiment.is_known()
    assert summaries[0] == summaries[2] and all(a != b for a, b in zip(*summaries[:2], strict=True))
    assert len([*node.experiment.path.glob("run.*.json")]) == 1, "the settings in between; those of before are present again"


def test_a_finished_phase_stays_finished_whatever_else_is_damaged(data_folder):
    node = open_phase("meta", "smoke")
    first = node.run()
    for name in ("phase.json", "status.json"):
        (node.folder.path / name).write_bytes(b"\xff")
    assert open_phase("meta", "smoke").run() == first and node.folder.status()["state"] == "done"
    assert open_phase("incubate", "smoke", module_index=0).run()["inputs_sha256"] == {"meta": first["weights_sha256"]}
    assert node.folder.finished() == first and read_job(node.job.path) == node.job, "it says again what it is"


def test_modules_of_two_meta_models_never_meet(data_folder):
    """Same settings, other weights (another device, a retrained meta model): what was made from the first is made again."""
    node, other = (open_phase("incubate", "smoke", module_index=i) for i in (1, 2))
    first, meta = node.run(), node.inputs["meta"]
    assert node.summary() == first and first["inputs_sha256"] == {"meta": meta.summary()["weights_sha256"]}
    tensors = {name: tensor + 0.1 for name, tensor in meta.folder.load_weights().items()}
    meta.folder.finish(meta.summary(), {"model": tensors})
    assert node.summary() is None
    variant = open_phase("incubate", "smoke", ["phases.finetune.epochs=1"], module_index=1)
    second = node.run()
    assert second["weights_sha256"] != first["weights_sha256"] and node.folder.status()["attempt"] == 2
    assert second["inputs_sha256"] == other.run()["inputs_sha256"] == {"meta": meta.summary()["weights_sha256"]}
    assert variant.run() == second
    shutil.rmtree(meta.folder.path)  # to save space: what is finished stays finished
    assert node.summary() == second


def test_other_images_than_planned_with_are_told(data_folder, tmp_path):
    text = "model: {img_size: 8, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, in_chans: 1}\n"
    text += "data: {source: synthetic, test_images: 96}\npartition: {num_modules: 2}\ntraining: {batch_size: 16}\n"
    (tmp_path / "mine.yaml").write_text(text)
    todo = plan(load_settings(str(tmp_path / "mine.yaml")))
    todo.write()
    file = todo.experiment.path / "run.json"
    file.write_text(file.read_text().replace('"num_images": 288', '"num_images": 300'))
    with pytest.raises(
        SettingsError, match=r"there are 288 training images for 4 outputs, but 300 for 4 when this run was planned"
    ):
        open_phase("meta", str(tmp_path / "mine.yaml")).run()


def test_a_phase_does_not_depend_on_what_does_not_concern_it(data_folder):
    plain, halves = (
        open_phase("end_to_end", "smoke", ["phases.end_to_end.epochs=1", *more]) for more in ([], ["partition.num_modules=2"])
    )
    assert plain.digest == halves.digest
    deep = open_phase("meta", "smoke", ["model.depth=9"])
    assert deep.digest == open_phase("meta", "smoke").digest
