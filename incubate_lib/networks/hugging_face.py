"""BERT and GPT-2 of Hugging Face's transformers, built from a config, as networks that map tokens to logits.

They are the library's own classes, with its names of weights: `save_pretrained` writes a folder that its `from_pretrained` loads.
Only embedding and head do not share their weights, because a cut would part them. The package (the extra `text`) is imported when
one of them is made.
"""

from functools import cache
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

FIELDS = {  # our names → theirs, in the configs of BERT and of GPT-2
    "hf_bert": {
        "num_classes": "vocab_size", "context": "max_position_embeddings", "embed_dim": "hidden_size",
        "depth": "num_hidden_layers", "num_heads": "num_attention_heads",
    },
    "hf_gpt2": {
        "num_classes": "vocab_size", "context": "n_positions", "embed_dim": "n_embd", "depth": "n_layer", "num_heads": "n_head",
    },
}  # fmt: skip
default_cfgs = generate_default_cfgs({"hf_bert": {"input_size": (512,)}, "hf_gpt2": {"input_size": (1024,)}})


@cache
def _classes(name: str) -> tuple[Any, Any]:
    """Return a model's config and its class, whose output is the logits alone."""
    try:
        import transformers
    except ImportError:
        raise ImportError("it needs the package transformers: pip install 'incubate-lib[text]'") from None
    config, base = {
        "hf_bert": (transformers.BertConfig, transformers.BertForMaskedLM),
        "hf_gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    }[name]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        mask = None
        if x.is_meta:  # there the library looks for packed sequences, and finds no values
            mask = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        return base.forward(self, input_ids=x, attention_mask=mask).logits

    own = {"forward": forward, "is_causal": name == "hf_gpt2", "__module__": __name__}
    return config, type(base.__name__, (base,), own)


def _made(name: str, arguments: dict[str, Any]) -> nn.Module:
    config, made = _classes(name)
    given = {key: value for key, value in arguments.items() if not key.startswith(("pretrained", "cache_dir"))}
    names, known = FIELDS[name], config().to_dict()
    for field in given.keys() - names.keys():
        if field not in known or field in names.values():
            raise TypeError(f"unexpected argument {field!r}")
    if name == "hf_bert" and "embed_dim" in given:
        given = {"intermediate_size": 4 * given["embed_dim"]} | given
    fields = {names.get(field, field): value for field, value in given.items()}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # the vocabulary's are not known here
    model = made(config(**{"tie_word_embeddings": False, "use_cache": False} | tokens | fields))
    if name == "hf_bert":  # the library's copy of the decoder's bias: without weights that are shared nothing uses it
        model.cls.predictions.bias = None
    model.num_classes = model.config.vocab_size
    return model


@register_model
def hf_bert(**arguments: Any) -> nn.Module:
    """BERT for masked tokens (arXiv 1810.04805)."""
    return _made("hf_bert", arguments)


@register_model
def hf_gpt2(**arguments: Any) -> nn.Module:
    """GPT-2."""
    return _made("hf_gpt2", arguments)
