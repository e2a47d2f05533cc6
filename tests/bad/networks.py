"""Bad settings of networks that are no plain ViTs: cuts, modules, starts, units, and arguments that they do not have."""

from bad.case import Bad

RESNET = "model={name: cifar_resnet20, img_size: 8, in_chans: 1, options: {channels: [4, 4, 8]}}"  # 7 blocks that can be left out
SWIN = (
    "model={{name: swin_tiny_patch4_window7_224, img_size: 8, patch_size: 1, in_chans: 1, embed_dim: 8, num_heads: {}, "
    "options: {{depths: [2, 2], window_size: {}}}}}"
)
LARGER = ["data.image_size=32", "data.num_images=144", "data.test_images=48"]
IN_TWO, WHOLE = "partition={num_modules: 2}", "partition=null"
VGG = "model={name: vgg11, img_size: 32, in_chans: 1, options: {mlp_ratio: 0.01}}"
NETWORKS = {  # what is wrong → what the message must name, and the overrides
    "a cut inside a residual block": ("layer1.0.conv1", [RESNET, "partition={cuts: [layer1.0.conv1]}"]),
    "a cut of another network": ("blocks.1", [RESNET, "partition={cuts: [blocks.1]}"]),
    "cuts of a ResNet in another order": ("order", [RESNET, "partition={cuts: [layer2.2, layer1.2]}"]),
    "a ResNet cut behind its head": ("fc", [RESNET, "partition={cuts: [layer1.2, fc]}"]),
    "cuts that are a word": ("cuts", [RESNET, "partition={cuts: layer1.2}"]),
    "more modules than blocks that can be left out": ("7 blocks", [RESNET, "partition={num_modules: 8}"]),
    "depths that count what halves the side": ("7 blocks", [RESNET, "partition={target_depths: [3, 3, 3]}"]),
    "more meta blocks than a module has": ("meta_depths", [RESNET, "partition={num_modules: 3, meta_depths: [3, 3, 3]}"]),
    "meta blocks of more modules than cuts": ("meta_depths", [RESNET, "partition={cuts: [layer1.2], meta_depths: [1, 1, 1]}"]),
    "stacks of blocks that the meta model lacks": (
        "'stack'", [RESNET, "partition={cuts: [layer2.1]}", "run=[deep_incubation_stack]"],
    ),
    "an identity start without residual branches": (
        "'identity'", [*LARGER, VGG, IN_TWO, "run=[deep_incubation_identity]"],
    ),
    "a DenseNet in pieces": (
        "without partition",
        [*LARGER, "model={name: densenet121, img_size: 32, in_chans: 1, options: {growth_rate: 4}}", IN_TWO],
    ),
    "a network of two streams in pieces": (
        "resnet50", ["data.image_size=240", "data.num_images=144", "data.test_images=48",
                     "model={name: crossvit_9_240, img_size: 240, in_chans: 1}", IN_TWO],
    ),
    "a depth of a ResNet": ("cifar_resnet20", [RESNET, "model.depth=6"]),
    "heads of a ResNet": ("cifar_resnet20", [RESNET, "model.num_heads=2"]),
    "layers of words": ("layers", [RESNET, "model.options.layers=[a, b, c]"]),
    "heads of fewer stages": ("num_heads", [SWIN.format("[2]", 4), IN_TWO]),
    "heads of no stage": ("num_heads", [SWIN.format("[]", 4), IN_TWO]),
    "no heads in a stage": ("num_heads", [SWIN.format("[2, 0]", 4), IN_TWO]),
    "heads that are words": ("num_heads", [SWIN.format("[2, many]", 4), IN_TWO]),
    "windows of nothing": ("window_size", [SWIN.format("[2, 2]", 0), IN_TWO]),
    "stages that are too few": (
        "depths", [*LARGER, "model={name: convnext_atto, img_size: 32, in_chans: 1, options: {depths: [2, 2]}}", IN_TWO],
    ),
    "an optimiser that is not known": ("optimizer", ["training.optimizer=lion"]),
    "a phase's optimiser that is not known": ("optimizer", ["phases.meta.optimizer=rmsprop"]),
    "an optimiser that is a list": ("optimizer", ["training.optimizer=[sgd]"]),
    "sub-layers of a ResNet": ("sublayers", [RESNET, WHOLE, "run=[mat]", "mat.units=sublayers"]),
    "filters of depthwise convolutions": (
        "filters", [*LARGER, "model={name: convnext_atto, img_size: 32, in_chans: 1, options: {depths: [1, 1, 1, 1], "
                    "dims: [8, 8, 8, 8]}}", WHOLE, "run=[mat]", "mat.units=filters"],
    ),
    "AdamW's drift with SGD": ("sgd", [RESNET, WHOLE, "run=[mat]", "mat.slow_every=4", "training.optimizer=sgd"]),
    "a name like one of those that timm lacks": ("cifar_resnet110", ["model.name=cifar_resnet111"]),
}  # fmt: skip


def catalogue() -> list[Bad]:
    found = []
    for name, (says, overrides) in NETWORKS.items():
        command = ("run", "smoke", *(part for override in overrides for part in ("--set", override)))
        found.append(Bad("networks", name, command, says=says))
    found.append(Bad("networks", "a preset that is misspelt", ("run", "cifar100-resnet-11"), says="cifar100-resnet-110"))
    return found
