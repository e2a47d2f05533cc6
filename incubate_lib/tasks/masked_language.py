"""Which tokens are masked in a text, as BERT learns it (arXiv 1810.04805): data.mask_share of them are asked for."""

from typing import ClassVar

from incubate_lib.tasks import Metric
from incubate_lib.tasks.language import Language


class MaskedLanguage(Language):
    name = "masked_language"
    metrics: ClassVar = (
        Metric("masked_perplexity", "masked perplexity", digits=2, higher_is_better=False, is_log=True),
        Metric("masked_accuracy", "masked tokens right", "%", scale=100.0, digits=1, is_share=True),
    )
    tags = ("fill-mask",)
    is_causal = False

    def chance(self, outputs: int) -> float:
        return float(outputs)


TASK = MaskedLanguage()
