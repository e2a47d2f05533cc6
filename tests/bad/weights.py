"""Bad checkpoints: files of torch for `incubate import`, and .safetensors files that a strategy starts from."""

import functools
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad.case import Bad, both, file, nothing, png

IMPORT = ("import", "a.pth", "new")
State = dict[str, Any]


@functools.cache
def sound() -> State:
    """Return the state dict of a Vision Transformer of two blocks, 16 wide."""
    import timm

    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "in_chans": 1, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **sizes).state_dict()


def saved(change: Callable[[State], Any], name: str = "a.pth", **how: Any) -> Callable[[Path], object]:
    """Return what saves a checkpoint: what `change` returns, or the state dict that it changed."""

    def make(here: Path) -> None:
        import torch

        state = dict(sound())
        changed = change(state)
        torch.save(state if changed is None else changed, here / name, **how)

    return make


def without(*names: str) -> Callable[[State], None]:
    return lambda state: [state.pop(name) for name in names] and None


def having(**tensors: Callable[[Any], Any]) -> Callable[[State], None]:
    """Return what puts other tensors in place of some, `__` for dots."""

    def change(state: State) -> None:
        import torch

        for name, make in tensors.items():
            state[name.replace("__", ".")] = make(torch)

    return change


def renamed(before: str, now: str) -> Callable[[State], State]:
    return lambda state: {name.replace(before, now): tensor for name, tensor in state.items()}


def bomb(here: Path) -> None:
    """Write a small zip file of 4 GB of zeros."""
    with zipfile.ZipFile(here / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            with archive.open(f"archive/data/{number}", "w") as member:
                for _ in range(64):
                    member.write(bytes(1 << 24))
        archive.writestr("archive/data.pkl", b"\x80\x02}.")


class Evil:
    """What would make a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def stages(change: Callable[[list[State]], Any]) -> Callable[[State], State]:
    """Return what saves the two blocks as two stages, as the released code does."""

    def split(state: State) -> State:
        later = ("blocks.1.", "norm.", "head.")
        first = {name: tensor for name, tensor in state.items() if not name.startswith(later)}
        second = {name.replace("blocks.1.", "blocks.0."): t for name, t in state.items() if name.startswith(later)}
        parts = [first, second]
        changed = change(parts)
        return {"model": state, "model_stages": parts if changed is None else changed}

    return split


FILES = {  # what is wrong with a.pth → what makes it
    "not there": nothing,
    "a folder": lambda here: (here / "a.pth").mkdir(),
    "a pipe": lambda here: os.mkfifo(here / "a.pth"),
    "a link to itself": lambda here: (here / "a.pth").symlink_to("a.pth"),
    "a device": lambda here: (here / "a.pth").symlink_to("/dev/zero"),
    "empty": file("a.pth", ""),
    "a text": file("a.pth", "hello"),
    "a picture": file("a.pth", png()),
    "zeros": file("a.pth", bytes(5000)),
    "cut short": both(saved(lambda state: None), lambda here: os.truncate(here / "a.pth", 9000)),
    "4 GB of zeros, zipped": bomb,
    "another zip": lambda here: zipfile.ZipFile(here / "a.pth", "w").writestr("a", "b"),
    "an entry with '..'": lambda here: zipfile.ZipFile(here / "a.pth", "w").writestr("../../a", "b"),
    "that runs code": saved(lambda state: {"model": Evil()}),
    "a pickle of protocol 0": file("a.pth", b"cos\nsystem\n(S'true'\ntR."),
    "a tensor": saved(lambda state: state["head.bias"]),
    "a list": saved(lambda state: [state]),
    "a number": saved(lambda state: 5),
    "an empty mapping": saved(lambda state: {}),
    "a mapping of numbers": saved(lambda state: {"a": 1}),
    "model is null": saved(lambda state: {"model": None}),
    "model is a list": saved(lambda state: {"model": [1]}),
    "model within model": saved(lambda state: {"model": {"model": state}}),
    "model_stages is a number": saved(lambda state: {"model": state, "model_stages": 5}),
    "model_stages of numbers": saved(lambda state: {"model": state, "model_stages": [1, 2]}),
    "keys that are numbers": saved(lambda state: dict(enumerate(state.values()))),
    "keys that are empty": saved(lambda state: {"": state["head.bias"]}),
    "no class token": saved(without("cls_token")),
    "no positions": saved(without("pos_embed")),
    "no patches": saved(without("patch_embed.proj.weight")),
    "no head": saved(without("head.weight", "head.bias")),
    "half a head": saved(without("head.bias")),
    "no norm": saved(without("norm.weight", "norm.bias")),
    "no first block": saved(lambda state: {k: v for k, v in state.items() if "blocks.0" not in k}),
    "half a block": saved(without("blocks.1.attn.proj.weight")),
    "a block is missing": saved(renamed("blocks.1", "blocks.3")),
    "block 1,000,000,000": saved(renamed("blocks.1.", "blocks.1000000000.")),
    "block 10^30": saved(renamed("blocks.1.", f"blocks.1{'0' * 30}.")),
    "block -1": saved(renamed("blocks.1.", "blocks.-1.")),
    "a block of words": saved(renamed("blocks.1.", "blocks.one.")),
    "a further weight": saved(having(fish=lambda torch: torch.zeros(3))),
    "another network": saved(lambda state: {"conv1.weight": state["head.weight"]}),
    "NaN": saved(having(head__bias=lambda torch: torch.full((4,), float("nan")))),
    "infinite": saved(having(cls_token=lambda torch: torch.full((1, 1, 16), float("inf")))),
    "whole numbers": saved(having(head__bias=lambda torch: torch.zeros(4, dtype=torch.int64))),
    "complex numbers": saved(having(head__bias=lambda torch: torch.zeros(4, dtype=torch.complex64))),
    "sparse": saved(having(head__weight=lambda torch: torch.zeros(4, 16).to_sparse())),
    "without data": saved(having(head__weight=lambda torch: torch.zeros(4, 16, device="meta"))),
    "no classes": saved(having(head__weight=lambda torch: torch.zeros(0, 16), head__bias=lambda torch: torch.zeros(0))),
    "a head of one row": saved(having(head__weight=lambda torch: torch.zeros(16))),
    "a head of another width": saved(having(head__weight=lambda torch: torch.zeros(4, 17))),
    "positions of no square": saved(having(pos_embed=lambda torch: torch.zeros(1, 6, 16))),
    "positions in two dimensions": saved(having(pos_embed=lambda torch: torch.zeros(5, 16))),
    "positions of nothing": saved(having(pos_embed=lambda torch: torch.zeros(1, 0, 16))),
    "patches of no square": saved(having(patch_embed__proj__weight=lambda torch: torch.zeros(16, 1, 4, 5))),
    "patches in two dimensions": saved(having(patch_embed__proj__weight=lambda torch: torch.zeros(16, 16))),
    "no channels": saved(having(patch_embed__proj__weight=lambda torch: torch.zeros(16, 0, 4, 4))),
    "10^12 classes in a few bytes": saved(
        having(
            head__weight=lambda torch: torch.zeros(1, 1).expand(10**12, 16),
            head__bias=lambda torch: torch.zeros(1).expand(10**12),
        )
    ),
    "10^10 positions in a few bytes": saved(having(pos_embed=lambda torch: torch.zeros(1, 1, 1).expand(1, 10**10 + 1, 16))),
    "a hidden layer of 10^9": saved(having(blocks__0__mlp__fc1__weight=lambda torch: torch.zeros(1, 1).expand(10**9, 16))),
    "a head of numbers": saved(lambda state: state.update({"head.bias": 5})),
    "stages that disagree": saved(stages(lambda parts: parts[0].update(cls_token=parts[0]["cls_token"] + 1))),
    "a stage too many": saved(stages(lambda parts: [*parts, parts[0]])),
    "an empty stage": saved(stages(lambda parts: [*parts, {}])),
    "a stage without blocks": saved(stages(lambda parts: [*parts, {"a": parts[0]["cls_token"]}])),
    "a name twice": saved(lambda state: state | {"module.cls_token": state["cls_token"] + 1}),
    "a class": saved(lambda state: {"a": type(state)}),
}
GOOD = saved(lambda state: None)
HEADS = ("--num-heads", "2")
ASKED = {  # a sound file, asked for wrongly
    "heads are not told": (*IMPORT,),
    "no heads": (*IMPORT, "--num-heads", "0"),
    "heads below 0": (*IMPORT, "--num-heads", "-2"),
    "heads that do not divide": (*IMPORT, "--num-heads", "3"),
    "heads of words": (*IMPORT, "--num-heads", "two"),
    "a moving average that is not there": (*IMPORT, *HEADS, "--ema"),
    "more heads than numbers": (*IMPORT, "--num-heads", "1000000000000"),
    "an unknown model": (*IMPORT, *HEADS, "--model", "vit_fish"),
    "a model that is no transformer": (*IMPORT, *HEADS, "--model", "resnet18"),
    "a model to be fetched": (*IMPORT, *HEADS, "--model", "hf-hub:a/b"),
    "an empty model": (*IMPORT, *HEADS, "--model", ""),
    "into a folder with files": ("import", "a.pth", "full", *HEADS),
    "into a file": ("import", "a.pth", "a.pth", *HEADS),
    "below a file": ("import", "a.pth", "a.pth/new", *HEADS),
    "into nowhere": ("import", "a.pth", "", *HEADS),
    "into a name that is too long": ("import", "a.pth", "a" * 300, *HEADS),
    "into a device": ("import", "a.pth", "/dev/null", *HEADS),
    "into /proc": ("import", "a.pth", "/proc/new", *HEADS),
    "the same file twice": ("import", "a.pth", "a.pth", "new", *HEADS),
    "and a second that is not there": ("import", "a.pth", "b.pth", "new", *HEADS),
    "a file without a name": ("import", "", "new", *HEADS),
}


def header(text: str | bytes, length: int | None = None) -> bytes:
    """Return a .safetensors file with this header."""
    blob = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(blob) if length is None else length) + blob


def tensor(dtype: str, shape: list[int], offsets: list[int], data: bytes = b"") -> bytes:
    return header(json.dumps({"head.bias": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})) + data


STARTS = {  # what is wrong with w.safetensors → its bytes
    "not there": None,
    "empty": b"",
    "a text": b"hello, world",
    "a header of 10^18 bytes": header("{}", 10**18),
    "a header that is no JSON": header("{a"),
    "a header of deep lists": header("[" * 100000),
    "a header of binary": header(b"\xff\xfe\x00"),
    "a header that is a list": header("[]"),
    "no tensors": header("{}"),
    "an unknown kind of numbers": tensor("F99", [4], [0, 16], bytes(16)),
    "offsets behind the end": tensor("F32", [4], [0, 10**12]),
    "offsets backwards": tensor("F32", [4], [16, 0], bytes(16)),
    "sizes that overflow": tensor("F32", [2**40, 2**40], [0, 16], bytes(16)),
    "sizes below 0": tensor("F32", [-4], [0, 16], bytes(16)),
    "one tensor alone": tensor("F32", [4], [0, 16], bytes(16)),
    "whole numbers": tensor("I64", [4], [0, 32], bytes(32)),
    "NaN": tensor("F32", [4], [0, 16], b"\xff" * 16),
}


def catalogue() -> list[Bad]:
    found = [Bad("checkpoints", name, (*IMPORT, *HEADS), make) for name, make in FILES.items()]
    for name, command in ASKED.items():
        found.append(Bad("checkpoints", name, command, both(GOOD, file("full/mine.txt", "mine"))))
    for name, content in STARTS.items():
        start = "strategies.tune={kind: finetune, weights: {here}/w.safetensors}"
        command = ("run", "smoke", "--strategies", "tune", "--set", start)
        found.append(Bad("weights to start from", name, command, nothing if content is None else file("w.safetensors", content)))
    for name, text in {
        "of another network": '{"architecture": "resnet18"}',
        "that is a list": "[]",
        "that is damaged": "{",
    }.items():
        make = both(GOOD, _as_safetensors, file("w/config.json", text))
        start = "strategies.tune={kind: finetune, weights: {here}/w}"
        found.append(
            Bad("weights to start from", f"a config.json {name}", ("run", "smoke", "--strategies", "tune", "--set", start), make)
        )
    return found


def _as_safetensors(here: Path) -> None:
    from safetensors.torch import save_file

    (here / "w").mkdir()
    save_file(sound(), here / "w" / "model.safetensors")
