"""Text: what is asked for, what is counted, what nobody may see; and that a network that reads tokens goes the way images go."""

import hashlib
import math
import re

import pytest
import timm
import torch
import yaml
from bad.texts import tokenizer
from test_devices import losses, train_on
from torch import nn

from incubate_lib.config import DataSettings, SettingsError, TrainingSettings, load_settings
from incubate_lib.config.members import TASKS
from incubate_lib.data.sets import load_data
from incubate_lib.data.text import contexts
from incubate_lib.data.text.contexts import NOT_ASKED, TextSet
from incubate_lib.data.text.corpora import AUSTEN, open_corpus
from incubate_lib.data.text.vocabulary import SPECIAL, open_vocabulary
from incubate_lib.method.chain import find_chain
from incubate_lib.method.mntk import kernel_by_definition, modular_kernels
from incubate_lib.method.network import divide, graft, without
from incubate_lib.method.units import find_units
from incubate_lib.networks import register_all
from incubate_lib.pipeline.graph import closure
from incubate_lib.pipeline.strategies import open_phase, plan
from incubate_lib.tasks import get
from incubate_lib.training.costs import train_flops_per_image
from incubate_lib.training.loop import evaluate
from incubate_lib.training.trainer import Trainer

register_all()
WORDS = ("alpha", "bravo", "charlie", "delta")
SMALL = {"num_classes": 40, "context": 12, "embed_dim": 8, "depth": 3, "num_heads": 2}
RUN = {
    "data": {"source": "text", "folder": "words"},
    "model": {"name": "text_causal", "context": 12, "embed_dim": 8, "depth": 4, "num_heads": 2},
    "partition": {"num_modules": 2},
    "training": {"epochs": 1, "batch_size": 8, "lr": 1e-2, "warmup_epochs": 0, "label_smoothing": 0},
    "phases": {"end_to_end": {"epochs": 2}},
}
SHARES = {"match": "end_to_end", "shares": {"meta": 0.4, "incubate": 0.3}}


@pytest.fixture
def words(monkeypatch, tmp_path):
    """Twenty documents, each of a word of its own and a few that all have, in a data folder."""
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / "data"))
    (folder := tmp_path / "data/datasets/words").mkdir(parents=True)
    for i in range(20):
        text = " ".join(f"q{i:05b}" if j % 3 else WORDS[(i + j) % 4] for j in range(40))
        (folder / f"{i:02}.txt").write_text(text)
    return folder


@pytest.fixture
def write(tmp_path, words):
    def write(**settings) -> str:
        (file := tmp_path / "mine.yaml").write_text(yaml.safe_dump(RUN | {"task": "language"} | settings))
        return str(file)

    return write


def a_set(mask_share=None, number=200, context=50, outputs=30) -> TextSet:
    torch.manual_seed(0)
    made = contexts.invented(number, context, outputs, mask_share, torch.device("cpu"))
    object.__setattr__(made.vocabulary, "special", (0, 1, 2))
    object.__setattr__(made.vocabulary, "mask", 2)
    return made


class Uniform(nn.Module):
    """Says of every token that it is equally likely."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return self.logits.expand(*x.shape, -1)


@pytest.mark.parametrize(("task", "share"), [("language", None), ("masked_language", 0.15)])
def test_a_model_that_knows_nothing_has_the_logarithm_of_the_vocabulary_as_loss(task, share):
    found = evaluate(Uniform(30), a_set(share), task=get(task))
    assert found["loss"] == pytest.approx(math.log(30), rel=1e-6)
    assert found["score"] == pytest.approx(get(task).chance(30), rel=1e-6)
    assert get(task).score.sign == -1


def test_no_two_tasks_have_a_metric_of_one_name():
    """Records and tables know a metric by its name alone."""
    names = [metric.name for task in TASKS for metric in TASKS[task].metrics]
    assert len(names) == len(set(names)) >= 6


def test_masks_are_berts_and_no_special_token_is_asked_for():
    data = a_set(0.15, number=2000)
    batch = data._windows(torch.arange(len(data)))
    torch.manual_seed(1)
    for given, asked, _ in (data.finish(batch), data.some(torch.arange(len(data)))):
        tokens, where = batch[0][:, :-1], asked != NOT_ASKED
        ordinary = tokens > 2
        assert (
            not where[~ordinary].any() and torch.equal(given[~where], tokens[~where]) and torch.equal(asked[where], tokens[where])
        )
        assert where[ordinary].double().mean().item() == pytest.approx(0.15, abs=0.005)
        masked, kept = (given[where] == 2).double().mean().item(), (given[where] == tokens[where]).double().mean().item()
        assert masked == pytest.approx(0.8 + 0.1 / 30, abs=0.015) and kept == pytest.approx(0.1 + 0.1 / 30, abs=0.015)


def test_evaluation_does_not_depend_on_the_batch_or_on_what_was_drawn_before(monkeypatch):
    data, model, found = a_set(0.15, number=37), timm.create_model("text_masked", **SMALL | {"context": 50}), []
    for most in (1, 7, 256):
        monkeypatch.setattr(contexts, "EVAL_BATCH", most)
        torch.rand(most)
        found.append(evaluate(model, data, task=get("masked_language")))
    assert all(other == pytest.approx(found[0], rel=1e-5) for other in found)


def test_every_token_but_the_first_is_asked_for_once_and_split_by_document(words):
    train, test = load_data(DataSettings(source="text", folder="words"), shape=(12,))
    everything = torch.cat([asked for _, asked, _ in test.eval_batches()]).flatten()
    assert torch.equal(everything, test.tokens[1 : 1 + len(everything)].long())
    texts = {name: part.vocabulary.decode(part.tokens.tolist()) for name, part in (("train", train), ("test", test))}
    val = load_data(DataSettings(source="text", folder="words", eval_split="val"), shape=(12,))[1]
    texts["val"] = val.vocabulary.decode(val.tokens.tolist())
    found = {name: {int(number, 2) for number in re.findall(r"q([01]{5})", text)} for name, text in texts.items()}
    assert found["test"] == {9, 19} and found["val"] == {8, 18} and found["train"] == set(range(20)) - {8, 9, 18, 19}


def test_the_vocabulary_knows_nothing_of_the_text_to_test_on(words):
    (words / "09.txt").write_text("ÿ" * 50)
    (words / "07.txt").write_text("é, naïve " * 20)
    for kind, signs in (("characters", True), ("bytes", False)):
        train, test = load_data(DataSettings(source="text", folder="words", vocabulary=kind), shape=(12,))
        assert ("é" in train.vocabulary.names) is signs and "ÿ" not in test.vocabulary.names
        text = "\f".join((words / f"{i:02}.txt").read_text() for i in (9, 19)) + "\f"
        assert int(test.lengths.sum()) == len(text), "bits are those of characters, whatever the tokens are"
    assert train.num_classes == 256 + len(SPECIAL)


def test_pieces_of_words_are_read_from_a_file_of_tokenizers(words):
    pytest.importorskip("tokenizers")
    (words / "own.json").write_text(tokenizer("[UNK]", "[SEP]", "[MASK]", *WORDS))
    settings = DataSettings(source="text", folder="words", vocabulary="own.json", mask_share=0.15)
    train, test = load_data(settings, shape=(12,))
    assert train.num_classes == 7 and train.vocabulary.special == (0, 1, 2) and train.vocabulary.mask == 2
    text = [(words / f"{i:02}.txt").read_text() for i in (9, 19)]
    assert int(test.lengths.sum()) == sum(map(len, text)) + len(text), "bits are those of characters"
    assert test.tokens.tolist().count(1) == 2 and test.tokens[-1] == 1
    first = [word if word in WORDS else "[UNK]" for word in text[0].split()]
    assert [train.vocabulary.names[token] for token in test.tokens.tolist()][: len(first)] == first


def test_no_token_sees_those_behind_it_and_of_masked_ones_every_one_sees_all():
    x = torch.randint(40, (2, 12))
    y = x.clone()
    y[:, 7] = (x[:, 7] + 1) % 40
    for name, sees in (("text_causal", False), ("text_masked", True)):
        torch.manual_seed(0)
        model = timm.create_model(name, **SMALL).eval()
        changed = (model(x) != model(y)).any(-1).any(0)
        assert model.is_causal is not sees and changed[7:].all() and changed[:7].any().item() is sees


def test_a_network_of_tokens_is_cut_and_put_together():
    torch.manual_seed(0)
    target, model = (timm.create_model("text_causal", **SMALL) for _ in range(2))
    partition = divide(find_chain(timm.create_model("text_causal", **SMALL), (12,)), [1, 2])
    assert partition.chain.blocks == ["blocks.0", "blocks.1", "blocks.2"]
    stem = {name for name in partition.chain.owners if partition.chain.is_stem(name)}
    assert stem == {"stem.embedding.weight", "stem.mix.weight", "stem.mix.bias", "stem.positions"}
    meta = without(model, ["blocks.2"])
    first = graft(meta, target, partition.claims(0))
    x = torch.randint(40, (2, 12))
    assert torch.equal(graft(first, target, partition.claims(1))(x), target(x)) and not torch.equal(first(x), target(x))
    # an own count: of each block 12 · width² weights and both products of attention; the stem's has no gradient of its input
    products = 3 * (12 * 8**2 * 12 + 2 * 12 * 12 * 8) + 12 * 8 * 40
    assert train_flops_per_image(target, (12,)) == 6 * products + 6 * 4 * 8 * 8 * 12


@pytest.mark.parametrize(("task", "share", "name"), [("language", None, "text_causal"), ("masked_language", 0.15, "text_masked")])
def test_a_phase_that_was_interrupted_ends_in_the_same_bits(task, share, name):
    def trainer(start, state=None):
        torch.manual_seed(0)
        model = timm.create_model(name, **SMALL)
        settings = TrainingSettings(epochs=1, batch_size=8, lr=1e-2, warmup_epochs=0)
        made = Trainer(model, a_set(share, number=40, context=12, outputs=40), settings, seed=3, task=get(task))
        if state:
            made.load_state_dict(state)
        made.begin(start)
        return made

    whole, half = trainer(0), trainer(0)
    for step in range(4):
        whole.step(step)
    for step in range(2):
        half.step(step)
    rest = trainer(2, half.state_dict())
    for step in (2, 3):
        rest.step(step)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))


@pytest.mark.parametrize(("task", "share", "name"), [("language", None, "text_causal"), ("masked_language", 0.15, "text_masked")])
def test_all_strategies_learn_from_text_for_the_same_cost(write, task, share, name):
    starts = {f"deep_incubation{start}": SHARES for start in ("", "_stack", "_identity")}
    others = {
        "growing": {"match": "end_to_end", "shares": {"meta": 0.4}}, "stacking": {"match": "end_to_end", "shares": {"meta": 0.4}},
        "imitation": SHARES, "together": SHARES | {"kind": "deep_incubation", "start": "stack", "together": True},
    }  # fmt: skip
    data = RUN["data"] | ({"mask_share": share} if share else {})
    file = write(task=task, data=data, model=RUN["model"] | {"name": name}, strategies=starts | others, run=["end_to_end"])
    made = plan(load_settings(file), ["end_to_end", *starts, *others])
    made.run()
    chance = get(task).chance(made.nodes[0].facts.outputs)
    for (strategy, _), node in made.finals.items():
        assert node.summary()["score"] < 0.9 * chance, strategy
    flops = [sum(before.flops for before in closure([node])) for node in made.finals.values()]
    assert max(flops) == pytest.approx(min(flops), rel=0.1)


@pytest.mark.parametrize("name", ["text_causal", "text_masked"])
def test_kernels_of_token_outputs_are_those_by_definition(name):
    torch.manual_seed(0)
    model, x = timm.create_model(name, **SMALL).double(), torch.randint(40, (3, 12))
    units, of_all = find_units(model, "sublayers"), []
    for outputs in ("sum", "last"):  # of all tokens, and of the last one
        of_all.append(modular_kernels(model, units, x, outputs=outputs))
        for unit, kernel in zip(units, of_all[-1], strict=True):
            expected = kernel_by_definition(model, [*unit.rows], x, outputs=outputs)
            torch.testing.assert_close(kernel, expected, rtol=1e-8, atol=1e-12)
    assert not torch.allclose(*of_all)
    heads = find_units(model, "heads")
    assert len(heads) == 6 and modular_kernels(model, heads, x).diagonal(dim1=1, dim2=2).gt(0).all()


def test_heads_rest_and_modules_learn_locally(write):
    mat = {"mat": {"kind": "end_to_end", "match": "end_to_end",
                   "mat": {"units": "heads", "probe": 4, "warmup_epochs": 0.5, "every_epochs": 0.5, "alpha": 0.5}}}  # fmt: skip
    data = RUN["data"] | {"mask_share": 0.15}
    model = RUN["model"] | {"name": "text_masked"}
    file = write(task="masked_language", data=data, model=model, strategies=mat | {"dgl": {"match": "end_to_end"}})
    made = plan(load_settings(file), ["end_to_end", "mat", "dgl"])
    made.run()
    whole, adaptive, local = (node.summary() for node in made.finals.values())
    assert adaptive["train_flops"] < whole["train_flops"] and local["head_parameters"] > 0
    assert all(s["score"] < 0.8 * get("masked_language").chance(made.nodes[0].facts.outputs) for s in (whole, adaptive, local))
    with pytest.raises(SettingsError, match="a text is no image"):
        plan(load_settings(file, ["strategies.infopro.match=end_to_end"]), ["infopro"])


@pytest.mark.parametrize("name", ["text_masked", "hf_bert"])
def test_two_processes_train_on_text_as_one(write, tmp_path, monkeypatch, words, name):
    if name == "hf_bert":
        pytest.importorskip("transformers")
    found, data = [], RUN["data"] | {"mask_share": 0.15}
    file = write(task="masked_language", data=data, model=RUN["model"] | {"name": name}, run=["end_to_end"])
    for devices in (1, 2):
        monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / str(devices)))
        (tmp_path / str(devices) / "datasets").mkdir(parents=True)
        (tmp_path / str(devices) / "datasets" / "words").symlink_to(words)
        node = open_phase("end_to_end", file, ["training.micro_batch=4", "phases.end_to_end.epochs=1"])
        train_on(devices, tmp_path / f"meeting-{devices}", node)
        found.append(losses(node.folder))
    for one, two in zip(*found, strict=True):
        assert [v for v in one if v is not None] == pytest.approx([v for v in two if v is not None], rel=1e-4)


def test_austen_is_what_the_page_says():
    page = (AUSTEN.parent / "README.md").read_text()
    assert hashlib.sha256(AUSTEN.read_bytes()).hexdigest() in page
    train, test, _ = open_corpus(DataSettings(source="austen"))
    val = open_corpus(DataSettings(source="austen", eval_split="val"))[1]
    assert f"{len(train)} + {len(val)} + {len(test)} documents" in page
    sizes = [sum(map(len, part)) for part in (train, val, test)]
    assert " + ".join(f"{size:,}" for size in sizes) in page
    assert len(open_vocabulary(DataSettings(source="austen"), train).names) == 71


def test_wikitext_is_read_in_its_layout_an_article_a_document(tmp_path):
    article = " = {0} = \n\n The {0} is a <unk> . \n\n = = History = = \n\n It was @-@ not . \n\n"
    for split, count in {"train": 3, "valid": 1, "test": 2}.items():
        (tmp_path / f"wiki.{split}.tokens").write_text("\n" + "".join(article.format(f"{split}{i}") for i in range(count)))
    train, test, _ = open_corpus(DataSettings(source="wikitext", folder=str(tmp_path)))
    assert [len(train), len(test)] == [3, 2] and all(text.startswith(" = ") and "= = History" in text for text in train + test)
    assert open_corpus(DataSettings(source="wikitext", folder=str(tmp_path), eval_split="val"))[1][0].startswith(" = valid0 = ")


def test_bytes_that_are_no_utf8_are_told_with_file_and_place_or_replaced(words):
    (words / "03.txt").write_bytes(b"good \xff bad " * 9)
    with pytest.raises(SettingsError, match=r"03\.txt: byte 5 \(0xff\) is no UTF-8"):
        open_corpus(DataSettings(source="text", folder="words"))
    train = open_corpus(DataSettings(source="text", folder="words", undecodable="replace"))[0]
    assert "good \ufffd bad" in train[3]


def test_the_standard_library_is_a_corpus_of_its_own_version():
    train, test, about = open_corpus(DataSettings(source="stdlib"))
    assert len(train) > 7 * len(test) > 100 and about.keys() == {"text_sha256", "python"}
    assert any("class Counter(dict)" in text for text in train + test)
