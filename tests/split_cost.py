"""What it costs that no forward pass is split by hand: `python tests/split_cost.py [ROUNDS] [--cpu]`.

An update of a hybrid, as `incubate run` does it, is timed in turn with one of the same layers in a forward pass that was written
by hand for that network, in as short a loop as there can be; before, how long it takes to find out where a network can be cut.
With --cpu the seconds are those of this process, on a machine that others use, too; with one thread they are comparable.
"""

import copy
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from incubate_lib.config import Settings
from incubate_lib.method.chain import find_chain
from incubate_lib.method.incubation import Hybrid
from incubate_lib.method.network import divide
from incubate_lib.phases.bench import Bench
from incubate_lib.training import stopwatch
from incubate_lib.training.stopwatch import Variant, measure, yardstick

NETWORKS = {  # what a step takes is mostly arithmetic, as in larger ones
    "vit": {"name": "vit_tiny_patch16_224", "img_size": 96, "depth": 12},
    "resnet": {"name": "resnet50", "img_size": 64},
    "swin": {"name": "swin_tiny_patch4_window7_224", "img_size": 112, "embed_dim": 48},
}
MODULES, INDEX, BATCH = 3, 1, 8  # the second module has a prefix and a suffix
LARGE = {"vit_base_patch16_224": 12, "swin_base_patch4_window7_224": 24}  # blocks


class Split(nn.Module):
    """A hybrid's layers, called by hand: what lies before the module without gradients, then the module, then the rest."""

    def __init__(self, hybrid: Hybrid) -> None:
        super().__init__()
        self.network, claims = hybrid.network, [hybrid.partition.claims(index) for index in range(MODULES)]
        owner = {name: [claim(name) for claim in claims].index(True) for name in self.order()}
        self.parts = [[self.network.get_submodule(n) for n in owner if owner[n] == index] for index in range(MODULES)]

    def train(self, mode: bool = True) -> "Split":
        super().train(False)
        for layer in self.parts[INDEX]:
            layer.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
            for layer in self.parts[0]:
                x = layer(x)
        for layer in self.parts[1] + self.parts[2]:
            x = layer(x)
        return self.head(x)


class SplitViT(Split):
    def order(self) -> list[str]:
        return [f"blocks.{name}" for name, _ in self.network.blocks.named_children()]

    def stem(self, x: Tensor) -> Tensor:
        return self.network.norm_pre(self.network._pos_embed(self.network.patch_embed(x)))

    def head(self, x: Tensor) -> Tensor:
        return self.network.head(self.network.norm(x)[:, 0])


class SplitResNet(Split):
    def order(self) -> list[str]:
        stages = ((stage, self.network.get_submodule(stage)) for stage in ("layer1", "layer2", "layer3", "layer4"))
        return [f"{stage}.{name}" for stage, blocks in stages for name, _ in blocks.named_children()]

    def stem(self, x: Tensor) -> Tensor:
        network = self.network
        return network.maxpool(network.act1(network.bn1(network.conv1(x))))

    def head(self, x: Tensor) -> Tensor:
        return self.network.fc(self.network.global_pool(x))


class SplitSwin(Split):
    def order(self) -> list[str]:
        names = []
        for i, stage in self.network.layers.named_children():
            names += [f"layers.{i}.downsample"] if any(True for _ in stage.downsample.parameters()) else []
            names += [f"layers.{i}.blocks.{j}" for j, _ in stage.blocks.named_children()]
        return names

    def stem(self, x: Tensor) -> Tensor:
        return self.network.patch_embed(x)

    def head(self, x: Tensor) -> Tensor:
        return self.network.head(self.network.norm(x))


SPLITS: dict[str, Callable[[Hybrid], Split]] = {"vit": SplitViT, "resnet": SplitResNet, "swin": SplitSwin}


def steps(rounds: int) -> None:
    device = torch.device("cpu")
    matmul = yardstick(device, "float32")
    print(f"{torch.get_num_threads()} threads, batch {BATCH}, {rounds} rounds; module {INDEX + 1} of {MODULES}")
    print("network  GFLOP a step  s a TFLOP: ours, by hand  share of a large product's rate  ours / by hand (least, most)")
    for name, model in NETWORKS.items():
        settings = Settings(name=name, model=model, partition={"num_modules": MODULES})
        made = Bench(settings, batch=BATCH, outputs=10, device=device)
        ours = made.ours("incubate", INDEX)
        for layer in ours.model.modules():
            if isinstance(layer, DropPath):  # chance would part the two; Swin's own default is not zero
                layer.drop_prob = 0.0
        by_hand = Variant(ours.name, ours.step, ours.flops, SPLITS[name](copy.deepcopy(ours.model)))
        ours.against = made.bare(by_hand)
        for _ in range(2):
            torch.testing.assert_close(ours.step(), ours.against.step())
        row, other = measure([ours, ours.against], rounds=rounds, device=device, matmul=matmul)
        slow = [1e12 * found["step_seconds"] / found["step_flops"] for found in (row, other)]
        print(
            f"{name:8} {row['step_flops'] / 1e9:12.2f}  {slow[0]:15.2f} {slow[1]:9.2f}  {row['share_of_matmul']:31.2f}  "
            f"{row['ratio']:.3f} ({row['ratio_min']:.3f}, {row['ratio_max']:.3f})"
        )


def anatomies(rounds: int) -> None:
    for name, blocks in LARGE.items():
        wall, cpu = [], []
        for _ in range(rounds):
            with torch.device("meta"):
                model = timm.create_model(name)
            began = time.perf_counter(), time.process_time()
            divide(find_chain(model, (3, 224, 224)), [blocks // 4] * 4)
            wall.append(time.perf_counter() - began[0])
            cpu.append(time.process_time() - began[1])
        print(f"the anatomy of {name}: {min(wall):.2f} to {max(wall):.2f} s, of CPU {min(cpu):.2f} to {max(cpu):.2f} s")


if __name__ == "__main__":
    if "--cpu" in sys.argv:
        stopwatch.time = SimpleNamespace(perf_counter=time.process_time)
    rounds = next((int(word) for word in sys.argv[1:] if word.isdigit()), 9)
    anatomies(rounds)
    steps(rounds)
