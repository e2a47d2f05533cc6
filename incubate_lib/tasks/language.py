"""Which token comes next in a text. A batch is tokens [B, T], the tokens behind them [B, T], and their characters [B, T].

Letters: B batch, T tokens of a context, V tokens of the vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from incubate_lib.data.text import NOT_ASKED
from incubate_lib.tasks import Metric, Task


class Language(Task):
    name = "language"
    metrics: ClassVar = (
        Metric("bits_per_character", "bits per character", higher_is_better=False),
        Metric("perplexity", "perplexity", digits=2, higher_is_better=False, is_log=True),
        Metric("next_token_accuracy", "next token right", "%", scale=100.0, digits=1, is_share=True),
    )
    num_sums = 5
    network = "A language model"
    tags = ("text-generation",)
    sample = "context"
    is_causal = True  # no token may see those behind it

    def outputs(self, data: Any) -> int:
        if not getattr(data, "is_text", False):
            raise ValueError("it is not text")
        if self.is_causal != (data.mask_share is None):
            other = "masked_language" if self.is_causal else "language"
            raise ValueError(f"data.mask_share is {data.mask_share or 'not set (BERT has 0.15)'}; that is task {other!r}")
        return data.num_classes

    def check_network(self, model: Any) -> None:
        sees = getattr(model, "is_causal", None)
        if sees is not self.is_causal:
            words = {True: "is causal", False: "sees the tokens that it is to guess"}
            what = words.get(sees, "does not say whether it is causal")
            raise ValueError(f"{what} (its attribute is_causal), which task {self.name!r} cannot learn with")

    def check_output(self, output: Any, samples: int, outputs: int) -> None:
        found = tuple(getattr(output, "shape", ())) or f"a {type(output).__name__}"
        if len(found) != 3 or (found[0], found[2]) != (samples, outputs):
            raise ValueError(f"gives {found} for {samples} contexts; the task needs {outputs} logits for each of their tokens")

    def chance(self, outputs: int) -> float:
        return math.log2(outputs)  # of characters

    def ready(self, batch: Any, data: Any, recipe: Any, extra: Any) -> Any:
        return data.finish(batch, recipe)

    def loss(self, output: Any, batch: Any, recipe: Any = None) -> Any:
        from torch.nn.functional import cross_entropy

        smoothing = 0.0 if recipe is None else recipe.label_smoothing
        asked = batch[1]
        loss = cross_entropy(output.float().flatten(0, 1), asked.flatten(), label_smoothing=smoothing, reduction="sum")
        return loss / (asked != NOT_ASKED).sum().clamp(min=1)  # of a batch in which nothing is masked nothing

    def sums(self, output: Any, batch: Any) -> Any:
        """Return the number of contexts, the sum of losses, tokens asked for, of these the right ones, and characters."""
        import torch
        from torch.nn.functional import cross_entropy

        _, asked, lengths = batch
        counted = asked != NOT_ASKED
        loss = cross_entropy(output.float().flatten(0, 1), asked.flatten(), reduction="none").double().sum()
        right = (output.argmax(-1) == asked).sum().double()
        sums = [loss.new_tensor(len(asked)), loss, counted.sum().double(), right, (lengths * counted).sum().double()]
        return torch.stack(sums)

    def divided(self, sums: list[float]) -> Mapping[str, float]:
        _, loss, tokens, right, characters = sums
        mean = loss / max(1.0, tokens)
        bits = loss / max(1.0, characters) / math.log(2)
        found = {"character": bits, "perplexity": math.exp(min(mean, 700.0)), "accuracy": right / max(1.0, tokens)}
        return {"loss": mean} | {metric.name: found[metric.name.rpartition("_")[2]] for metric in self.metrics}


TASK = Language()
