"""Bad texts: corpora, vocabularies, masks, and networks and tasks that are not made for them."""

import json
from collections.abc import Callable
from pathlib import Path

from bad.case import Bad, both, file, nothing

SETTINGS = """
task: {task}
data: {{{data}}}
model: {{name: {name}, context: 16, embed_dim: 8, depth: 2, num_heads: 2}}
partition: {{num_modules: 2}}
training: {{epochs: 1, batch_size: 4, warmup_epochs: 0, label_smoothing: 0}}
run: [end_to_end]
"""
PLAIN = "data: {{{}}}\ntask: language\nmodel: {{img_size: 8, patch_size: 4, in_chans: 1}}\nrun: [end_to_end]\n"
LAST = "data: {source: digits}\nmodel: {img_size: 8, patch_size: 4, in_chans: 1}\nmat: {outputs: last}\nrun: [mat]\n"
FOLDER = "source: text, folder: words"
PROSE = "It is a truth universally acknowledged. " * 20


def settings(data: str = FOLDER, task: str = "language", name: str = "text_causal") -> Callable[[Path], object]:
    return file("mine.yaml", SETTINGS.format(data=data, task=task, name=name))


def words(number: int = 10, text: str | bytes = PROSE, place: str = "") -> Callable[[Path], object]:
    """Return what makes a folder of documents that are all alike."""
    return both(*(file(f"words/{place}{i}.txt", text) for i in range(number)))


def tokenizer(*names: str) -> str:
    """Return a file of tokenizers that knows words, of which those in brackets are no text."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = [{"id": i, "content": name, "special": True} | plain for i, name in enumerate(names) if name.startswith("[")]
    model = {"type": "WordLevel", "vocab": {name: i for i, name in enumerate(names)}, "unk_token": "[UNK]"}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    parts = {"version": "1.0", "added_tokens": special, "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    return json.dumps(parts | nothing)


def vocabulary(content: str, more: str = "", task: str = "language", name: str = "text_causal") -> Callable[[Path], object]:
    data = f"{FOLDER}, vocabulary: own.json{more}"
    return both(words(), file("words/own.json", content), settings(data, task, name))


MASKED = {"task": "masked_language", "name": "text_masked"}
WRONG = {  # what is wrong → what the message must name, and what makes it
    "a corpus without files": ("no .txt files", both(file("words/a.md", PROSE), settings())),
    "a corpus that is not there": ("is not there", settings()),
    "a corpus of empty files": ("holds no text", both(words(text=""), settings())),
    "a corpus of blanks": ("holds no text", both(words(text=" \n\n"), settings())),
    "a text shorter than a context": ("too few for one context", both(words(text="ab"), words(1, PROSE), settings())),
    "documents too few to be split": ("2 document(s)", both(words(2), settings())),
    "no subfolder to test on": ("none test", both(words(place="train/"), settings())),
    "a split without documents": ("no .txt files", both(words(place="train/"), file("words/test/a.md", ""), settings())),
    "a split of empty documents": ("test split holds no text", both(words(place="train/"), words(2, "", "test/"), settings())),
    "bytes that are no UTF-8": ("3.txt: byte 5", both(words(), file("words/3.txt", b"caf. \xe9t\xe9"), settings())),
    "Latin-1 to test on": ("9.txt: byte 0", both(words(), file("words/9.txt", b"\xfcber"), settings())),
    "WikiText without its files": ("wiki.train.tokens", both(words(), settings("source: wikitext, folder: words"))),
    "WikiText without a test split": (
        "wiki.test.tokens", both(file("words/wiki.train.raw", f" = A = \n{PROSE}"), settings("source: wikitext, folder: words")),
    ),
    "a vocabulary that is not there": ("there is no file", both(words(), settings(f"{FOLDER}, vocabulary: own.json"))),
    "a vocabulary that is a folder": ("there is no file", both(words(), settings(f"{FOLDER}, vocabulary: ."))),
    "a vocabulary of no kind": ("no file of tokenizers", vocabulary("{}")),
    "a vocabulary that is cut short": ("no file of tokenizers", vocabulary(tokenizer("[UNK]", "[SEP]")[:90])),
    "a vocabulary that ends no document": ("ends a document", vocabulary(tokenizer("[UNK]", "It", "is"))),
    "a vocabulary without a mask": ("mask token", vocabulary(tokenizer("[UNK]", "[SEP]", "It"), ", mask_share: 0.15", **MASKED)),
    "a vocabulary that is empty": ("vocabulary", both(words(), settings(f"{FOLDER}, vocabulary: ''"))),
    "nothing is masked": ("mask_share is 0", both(words(), settings(f"{FOLDER}, mask_share: 0.0", **MASKED))),
    "all is masked": ("mask_share is 1", both(words(), settings(f"{FOLDER}, mask_share: 1.0", **MASKED))),
    "masks that are not said": ("BERT has 0.15", both(words(), settings(**MASKED))),
    "masks for the next token": ("'masked_language'", both(words(), settings(f"{FOLDER}, mask_share: 0.15"))),
    "masks for images": ("mask_share", settings("source: digits, mask_share: 0.15")),
    "causal training of a bidirectional network": ("is_causal", both(words(), settings(name="text_masked"))),
    "masked training of a causal network": (
        "is causal", both(words(), settings(f"{FOLDER}, mask_share: 0.15", "masked_language", "text_causal")),
    ),
    "text for a network of images": ("takes images", both(words(), file("mine.yaml", PLAIN.format(FOLDER)))),
    "images for a network of text": ("takes text", settings("source: digits")),
    "classes of a text": ("'masked_language'", both(words(), settings(task="classification"))),
    "a language of images": ("not text", file("mine.yaml", PLAIN.format("source: digits"))),
    "the last token of an image": ("mat.outputs 'last'", file("mine.yaml", LAST)),
    "test images of a text": ("test_images", settings("source: austen, test_images: 3")),
    "a text that is shrunk": ("resize", settings("source: austen, resize: 8")),
    "a folder of a corpus that comes along": ("folder", settings("source: austen, folder: words")),
    "a way with bytes that is not known": ("undecodable", settings(f"{FOLDER}, undecodable: ignore")),
    "a corpus that is misspelt": ("'asten'", settings("source: asten")),
}  # fmt: skip
OVERRIDES = {  # of the preset austen
    "text that is mirrored": ("hflip", "training.hflip=true"),
    "text that is mixed": ("mixup", "training.mixup=0.8"),
    "text that is moved": ("shift", "training.shift=1"),
    "contexts of no token": ("context", "model.context=0"),
    "contexts longer than the text": ("too few for one context", "data.train_share=1e-6"),
    "heads that do not divide the width": ("num_heads 3", "model.num_heads=3"),
    "images of a text network": ("img_size", "model.img_size=32"),
    "InfoPro of a text": ("a text is no image", "run=[infopro]"),
}


def catalogue() -> list[Bad]:
    found = [Bad("texts", name, ("run", "mine.yaml"), make, says) for name, (says, make) in WRONG.items()]
    for name, (says, override) in OVERRIDES.items():
        found.append(Bad("texts", name, ("run", "austen", "--set", override), nothing, says))
    return found
