"""Text as the loop sees it: contexts of a fixed number of tokens, one behind the other, on the device.

Letters: B batch, S tokens of a split, T tokens of a context, V tokens of the vocabulary.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from incubate_lib.config import DEFAULT_MACHINE, DataSettings, MachineSettings, SettingsError, TrainingSettings, refuse
from incubate_lib.data.order import EVAL_BATCH, Order, moved
from incubate_lib.data.text import NOT_ASKED
from incubate_lib.data.text.corpora import open_corpus
from incubate_lib.data.text.vocabulary import Vocabulary, open_vocabulary

REPLACED, SWAPPED = 0.8, 0.1  # of the tokens that are asked for: a mask stands there, or any token; all others stay (BERT)
MOST_LOGITS = 2**26  # that evaluation makes at once
LINE = 16  # characters of a line, where a context is drawn
Batch = tuple[Tensor, Tensor, Tensor]  # tokens [B, T], tokens that are asked for [B, T] int64, their characters [B, T] uint8


@dataclass(frozen=True)
class TextSet:
    """The contexts of a split. Each token but the first is asked for once, or of what is masked a share of them."""

    tokens: Tensor  # [S] int32, on one device
    lengths: Tensor  # [S] uint8: the characters that each stands for
    context: int  # T
    vocabulary: Vocabulary
    mask_share: float | None = None  # none: the next token is asked for
    about: Mapping[str, str] = field(default_factory=dict)  # where the text is from
    is_text = True

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    @property
    def shape(self) -> tuple[int]:
        return (self.context,)

    @property
    def num_classes(self) -> int:
        return len(self.vocabulary.names)

    @cached_property
    def special(self) -> Tensor:
        """The tokens that are not asked for where masked ones are, on the device."""
        return torch.tensor(self.vocabulary.special, device=self.tokens.device)

    @property
    def characters(self) -> float:
        """For how many characters a context stands, on average."""
        return self.context * self.lengths.double().mean().item()

    @property
    def mean(self) -> Tensor:
        return torch.zeros(())  # nothing is normalised

    @property
    def std(self) -> Tensor:
        return torch.ones(())

    def preview(self, num: int, recipe: TrainingSettings | None = None) -> Tensor:
        """Return the first contexts as pictures, uint8 [num, 1, H, W], with what is masked in training if a recipe is given."""
        index = torch.arange(min(num, len(self)))
        x, _, _ = self.some(index) if recipe is None else self.finish(self._windows(index))
        lines = [textwrap.wrap(self.vocabulary.decode(row), LINE)[: 1 + 2 * self.context // LINE] for row in x.tolist()]
        highest = "\n".join(["Ágy"] * max(map(len, lines), default=1))
        height = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((2, 2), highest)[3]
        size = (6 * LINE + 4, math.ceil(height) + 2)
        pictures = np.zeros((len(lines), 1, *size[::-1]), dtype=np.uint8)
        for picture, text in zip(pictures, lines, strict=True):
            canvas = Image.new("L", size, 255)
            ImageDraw.Draw(canvas).multiline_text((2, 2), "\n".join(text), fill=0)
            picture[0] = np.asarray(canvas)
        return torch.from_numpy(pictures)

    def some(self, index: Tensor) -> Batch:
        """Return contexts as evaluated: what is masked in one follows from its place in the text alone."""
        draws = None
        if self.mask_share is not None:
            rows = [np.random.default_rng(i).random(self.context, np.float32) for i in index.tolist()]
            draws = torch.from_numpy(np.stack(rows)).to(self.tokens.device)
        return self._asked(*self._windows(moved(index, self.tokens.device)), draws)

    def batches(self, order: Order) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield micro-batches to train on: tokens and their characters, each [B, T + 1]; `finish` makes them ready."""
        for _, _, index in order:
            yield self._windows(moved(index, self.tokens.device))

    def finish(self, batch: tuple[Tensor, Tensor], recipe: TrainingSettings | None = None) -> Batch:
        """Mask tokens, where that is asked for, drawing from the global generators."""
        tokens, lengths = batch
        draws = None if self.mask_share is None else torch.rand(len(tokens), self.context, device=tokens.device)
        return self._asked(tokens, lengths, draws)

    def eval_batches(self, rank: int = 0, devices: int = 1, keep: bool = True) -> Iterator[Batch]:
        """Yield the contexts that fall to this rank, each once over all ranks."""
        most = max(1, min(EVAL_BATCH, MOST_LOGITS // (self.context * self.num_classes)))
        for index in torch.arange(rank, len(self), devices).split(most):
            yield self.some(index)

    def _windows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        places = index[:, None] * self.context + torch.arange(self.context + 1, device=index.device)
        return self.tokens[places].long(), self.lengths[places]

    def _asked(self, tokens: Tensor, lengths: Tensor, draws: Tensor | None) -> Batch:
        """Return what a network is given and what it is asked for, of tokens [B, T + 1] and random numbers [B, T] in 0 … 1."""
        if draws is None:
            return tokens[:, :-1], tokens[:, 1:], lengths[:, 1:]
        tokens, lengths = tokens[:, :-1], lengths[:, :-1]
        draws = (draws / self.mask_share).masked_fill(torch.isin(tokens, self.special), 1.0)  # below 1: asked for
        swap = ((draws - REPLACED) / SWAPPED * self.num_classes).long().clamp(0, self.num_classes - 1)
        given = torch.where(draws < REPLACED + SWAPPED, swap, tokens).masked_fill(draws < REPLACED, self.vocabulary.mask)
        return given, tokens.masked_fill(draws >= 1, NOT_ASKED), lengths


def load_texts(
    settings: DataSettings, device: torch.device, shape: tuple[int, ...] | None, machine: MachineSettings = DEFAULT_MACHINE
) -> tuple[TextSet, TextSet]:
    """Return the contexts to train on and those to evaluate on, of as many tokens as the network takes (`shape`).

    SettingsError for a split that has fewer tokens than one context, and for masks without a token for them.
    """
    what, names = f"data.source {settings.source!r}", "text_causal and text_masked, for example"
    if shape is None or len(shape) != 1:
        raise SettingsError(f"{what} is text, but the network takes images of {shape} (model.name); {names} take text")
    *splits, about = open_corpus(settings, machine)
    vocabulary = open_vocabulary(settings, splits[0], machine)
    if settings.mask_share is not None and vocabulary.mask is None:
        raise SettingsError(f"data.vocabulary {settings.vocabulary!r} has no mask token ([MASK]), which data.mask_share needs")
    sets = []
    for split, documents in zip(("train", settings.eval_split), splits, strict=True):
        tokens, lengths = vocabulary.encode(documents)
        kept = round(settings.train_share * len(tokens)) if split == "train" else len(tokens)
        short = (
            f"{what}: the {split} split has {kept:,} tokens, too few for one context of {shape[0]} (model.context) and its end"
        )
        refuse(kept <= shape[0], short)
        parts = (torch.from_numpy(part[:kept]).to(device) for part in (tokens, lengths))
        sets.append(TextSet(*parts, shape[0], vocabulary, settings.mask_share, about))
    return tuple(sets)


def invented(number: int, context: int, outputs: int, mask_share: float | None, device: torch.device) -> TextSet:
    """Return so many contexts of random tokens, to measure how long an update takes."""
    tokens = torch.randint(outputs, (number * context + 1,), dtype=torch.int32, device=device)
    vocabulary = Vocabulary([""] * outputs, special=(), end=0, mask=0, encoder=None)
    return TextSet(tokens, torch.ones_like(tokens, dtype=torch.uint8), context, vocabulary, mask_share)
