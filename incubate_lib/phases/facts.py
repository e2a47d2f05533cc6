"""What planning must know about images and networks: counts and FLOPs. Measured once, then kept with the experiment.

Measuring imports torch and timm and reads the images (10 s on a slow machine); with the facts on disk, `incubate run`
sees in a moment that everything is done. This module itself does not import torch.
"""

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AliasChoices, Field

from incubate_lib.config import SCENES, Frozen, PhaseSettings, Settings, SettingsError, in_a_line, refuse
from incubate_lib.config.members import PHASES, TASKS

SEED = "{seed}"  # in the name of weights: the seed of the run that starts from them


class Facts(Frozen):
    """Facts about one experiment's data and networks."""

    num_images: Annotated[int, Field(ge=1)]  # to train on
    outputs: int = Field(validation_alias=AliasChoices("outputs", "num_classes"))  # of the head; the latter in old records
    target_depths: list[int]
    meta_depths: list[int]
    takes_depth: bool = True  # whether the meta model is built with less depth; else it is the target with blocks left out
    # Training FLOPs of one image: meta, target (fine-tuning too), incubate-0, imitate-0, target-14, and of small images meta@14
    # …; of a network with batch norm renewal, too, which goes through it forward only
    flops_per_image: dict[str, int]
    low_resolution: dict[str, int] = {}  # strategies that begin with small images → their size in pixels
    unsupported: dict[str, str]  # starts, and strategies with small images, that these networks lack, and why
    units: dict[str, int] = {}  # kinds of units of Modular Adaptive Training in the target network → their number
    unsupported_units: dict[str, str] = {}  # kinds among them that cannot be used, and why
    weights: dict[str, str] = {}  # files that strategies start from → SHA-256
    unused_classes: list[int] = []  # outputs with nothing to learn from: of labels that do not begin at 0 or have gaps

    def flops_of(self, phase: PhaseSettings) -> int:
        """Return the training FLOPs of one image in this phase; 0 where none passes through."""
        if not (phase.training or phase.options.get("renew")):
            return 0
        return self.flops_at(phase.model.img_size)[PHASES[phase.phase].cost(phase.model, phase.options)]

    def flops_at(self, size: int | None) -> dict[str, int]:
        """Return by name the training FLOPs of an image of so many pixels; None: of the network's own."""
        parts = {name.partition("@")[::2]: flops for name, flops in self.flops_per_image.items()}
        return {name: flops for of in ("", str(size)) for (name, at), flops in parts.items() if at == of}


def usual_units(units: Iterable[str]) -> str:
    """Return which of a network's kinds of units rest where nobody says: sub-layers, or where those are not known heads; of
    what is no transformer convolutions."""
    return next((kind for kind in ("sublayers", "heads") if kind in units), "conv_layers")


def measure(settings: Settings) -> Facts:
    """Read the images, build the networks on the meta device and count; SettingsError if they do not fit together."""
    from incubate_lib.data.sets import load_data
    from incubate_lib.phases.networks import model_shape

    shape = model_shape(settings.model)
    task, source = TASKS[settings.task], settings.data.source  # an unknown name is reported before images are read
    is_scenes = source in SCENES
    refuse(
        task.has_classes if is_scenes else task.is_on_top,
        f"task {settings.task!r} does not fit data.source {source!r}, whose images show "
        + ("several things" if is_scenes else "one thing"),
    )
    train, _ = load_data(settings.data, shape=shape, machine=settings.machine)
    if train.shape != shape:
        raise SettingsError(
            f"the model takes images of {shape} (channels, height, width: model.in_chans, model.img_size), "
            f"but data.source {settings.data.source!r} has {train.shape}"
        )
    for name, strategy in settings.strategies.items():
        for phase in strategy.trains:
            train.preview(1, settings.training_of(name, phase))  # an augmentation that cannot work fails now
    facts = count(settings, len(train), outputs_for(settings, train))
    _check_task(settings, train, facts.outputs)
    _check_classes(settings)
    return facts.model_copy(update={"unused_classes": task.unlearned(train)})


def outputs_for(settings: Settings | PhaseSettings, data: Any) -> int:
    """Return how many outputs the network's head needs for some data, or for data of which the counts are known."""
    try:
        return TASKS[settings.task].outputs(data)
    except ValueError as error:
        raise SettingsError(f"task {settings.task!r} cannot learn data.source {settings.data.source!r}: {error}") from None


def _check_task(settings: Settings, train: Any, outputs: int) -> None:
    """Raise SettingsError unless the task has a loss and sums for some images."""
    import torch
    from torch.utils._pytree import tree_map_only

    task, output = TASKS[settings.task], _tried(settings, outputs)[1]
    output = tree_map_only(torch.Tensor, lambda tensor: torch.zeros(tensor.shape), output)
    try:
        batch = train.some(torch.arange(2))
        task.loss(output, batch)
        sums = task.sums(output, batch)
        task.evaluated(sums.tolist())
    except Exception as error:  # whatever a task does with what it was not made for
        raise SettingsError(
            f"task {settings.task!r} does not fit data.source {settings.data.source!r}: {in_a_line(error)}"
        ) from None
    if sums.shape != (task.num_sums,):
        raise SettingsError(f"task {settings.task!r} has sums of shape {tuple(sums.shape)}, but its num_sums is {task.num_sums}")


def _check_classes(settings: Settings) -> None:
    """Raise SettingsError where weights to start from have the same classes as the images, in another order."""
    from incubate_lib.data.sources import open_source
    from incubate_lib.phases.classes import check_order, label_names

    task = TASKS[settings.task]
    for name, strategy in settings.strategies.items():
        weights = strategy.get("weights")
        if weights and SEED not in weights and not task.is_on_top and (known := label_names(weights)):
            names = task.output_names(open_source(settings.data, settings.machine)[0].classes)
            check_order(names, known, f"strategies.{name}.weights")


def count(settings: Settings, num_images: int, outputs: int) -> Facts:
    """Build the networks on the meta device and count, for so many images to train on; none is needed for it."""
    from incubate_lib.method.units import count_units
    from incubate_lib.phases.networks import depths_of, model_shape, takes_depth
    from incubate_lib.phases.recipes import networks_of

    shape, (model, _) = model_shape(settings.model), _tried(settings, outputs)
    units, depths, unsupported_units = {}, ([], []), {}
    if TASKS[settings.task].is_on_top:
        cut = f"task {settings.task!r} trains whole networks: leave out partition, and start from weights of a run in pieces"
        refuse(settings.partition, cut)
    else:
        units = count_units(model)
    if settings.partition is None:
        unsupported_units = _unsupported_units(model, units, shape)
    else:
        depths = depths_of(settings)
        if not takes_depth(settings.model):  # of ViTs all are known to be possible; to look at a ResNet's filters takes seconds
            given = [settings.mat, *(strategy.mat for strategy in settings.strategies.values())]
            asked = {mat.units or usual_units(units) for mat in given if mat}
            unsupported_units = _unsupported_units(model, [kind for kind in units if kind in asked], shape)
    sizes, small, unsupported = _small_images(settings, model, shape, outputs, depths)
    networks = networks_of(settings, depths, outputs)
    flops = _counted(networks)
    if networks.partition:
        unsupported |= _unsupported_starts(networks)
    return Facts(
        num_images=num_images,
        outputs=outputs,
        target_depths=depths[0],
        meta_depths=depths[1],
        takes_depth=not depths[0] or takes_depth(settings.model),
        flops_per_image=flops | small,
        unsupported=unsupported,
        units=units,
        low_resolution=sizes,
        unsupported_units=unsupported_units,
        weights=_weights(settings, outputs, *depths),
    )


def _counted(networks: Any) -> dict[str, int]:
    """Return the training FLOPs of an image in all kinds of phases, by name."""
    return {name: flops for kind in PHASES for name, flops in PHASES[kind].count(networks).items()}


def _unsupported_starts(networks: Any) -> dict[str, str]:
    """Return the starts that modules cannot have, and why."""
    import torch

    from incubate_lib.method.incubation import start_module

    unsupported, (meta, target, partition) = {}, (networks.hybrids_of, networks.target, networks.partition)
    for start in ("stack", "identity"):
        try:
            with torch.device("meta"):
                for i in range(partition.num_modules):
                    start_module(target, meta, partition, i, start, inherit_stem=True, inherit_head=True)
        except ValueError as error:
            unsupported[start] = str(error)
    return unsupported


def _tried(settings: Settings, outputs: int) -> tuple[Any, Any]:
    """Return the network on the meta device, and what it gives for two images; SettingsError if the task cannot learn it."""
    import torch

    from incubate_lib.method.sizes import blank
    from incubate_lib.phases.networks import build_for, model_shape

    network = f"model.name {settings.model.name!r} with model.options {settings.model.options}"
    with torch.device("meta"):
        shape, model = model_shape(settings.model), build_for(settings.task, settings.model, settings.model.depth, outputs)
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = names.setdefault(id(tensor), name)
        refuse(first != name, f"{network} shares one tensor under two names, {first} and {name}; no file of weights can say so")
    try:
        with torch.no_grad():
            output = model.train()(blank(model, 2, shape))  # batch norm cannot train on one image
    except Exception as error:  # networks check their images by asserts and by failing somewhere inside
        raise SettingsError(
            f"{network} fails with images of {shape} (channels, height, width: model.in_chans, model.img_size): "
            f"{in_a_line(error)}"
        ) from None
    try:
        TASKS[settings.task].check_output(output, 2, outputs)
        TASKS[settings.task].check_network(model)
    except ValueError as error:
        raise SettingsError(f"{network} {error}") from None
    return model, output


def _small_images(
    settings: Settings, model: Any, shape: tuple[int, int, int], outputs: int, depths: tuple[list[int], list[int]]
) -> tuple[dict[str, int], dict[str, int], dict[str, str]]:
    """Return the size of the small images that strategies begin with, what training on one costs, and what is not possible, why.

    A network that cannot have smaller images is an error only for a strategy that the user made or changed.
    """
    import torch

    from incubate_lib.method.sizes import patch_size
    from incubate_lib.phases.networks import build_model, in_one_piece
    from incubate_lib.phases.recipes import networks_of
    from incubate_lib.training.costs import FlopCounts

    sizes, flops, unsupported = {}, {}, {}
    whole = None if settings.partition is None else in_one_piece(settings.model)
    for name, strategy in settings.strategies.items():
        if not (small_images := strategy.get("low_resolution")):
            continue
        if len(shape) != 3:
            unsupported[name] = "the network reads text, not images"
            refuse(not strategy.is_as_named(name), f"strategies.{name}.low_resolution: {unsupported[name]}")
            continue
        patch = patch_size(model)
        size = small_images.img_size or max(1, shape[1] // 2 // patch) * patch
        try:
            if size >= shape[1] or size % patch:
                raise SettingsError(
                    f"it must be smaller than the network's ({shape[1]} pixels) and divisible by its patches ({patch})"
                )
            smaller = settings.model.model_copy(update={"img_size": size})
            with torch.device("meta"):
                small = build_model(smaller, smaller.depth, outputs)
            if strategy.is_cut:
                networks = networks_of(settings.model_copy(update={"model": smaller}), depths, outputs)
                flops |= {f"{key}@{size}": number for key, number in _counted(networks).items()}
            else:
                flops[f"target-{size}"] = FlopCounts((shape[0], size, size)).per_image(small, whole)
            sizes[name] = size
        except (SettingsError, RuntimeError) as error:  # the latter from poolings that find nothing left
            unsupported[name] = f"small images of {size} pixels: {str(error).splitlines()[0]}"
            if not strategy.is_as_named(name):
                raise SettingsError(f"strategies.{name}.low_resolution, {unsupported[name]}") from None
    return sizes, flops, unsupported


def _unsupported_units(model: Any, kinds: Iterable[str], shape: tuple[int, int, int]) -> dict[str, str]:
    """Return the kinds of units whose kernels or partial updates this network, on the meta device, does not allow, and why."""
    import copy

    from incubate_lib.method.mat import PartialUpdates
    from incubate_lib.method.mntk import modular_kernels
    from incubate_lib.method.sizes import blank
    from incubate_lib.method.units import find_units

    unsupported_units, images = {}, blank(model, 2, shape)
    for kind in kinds:
        twin = copy.deepcopy(model)
        try:
            units = find_units(twin, kind)
            PartialUpdates(twin, units, images[:1])
            modular_kernels(twin, units, images)
        except (ValueError, RuntimeError) as error:  # the latter from layers that do something of their own
            unsupported_units[kind] = str(error).splitlines()[0]
    return unsupported_units


def _weights(settings: Settings, outputs: int, target_depths: list[int], meta_depths: list[int]) -> dict[str, str]:
    """Return the SHA-256 of each file of weights that a strategy starts from, whatever the seed; SettingsError for one that does
    not fit."""
    files = {name: file for name, strategy in settings.strategies.items() if (file := strategy.get("weights"))}
    depths = target_depths, meta_depths
    return {file: weights_of(settings, name, file, outputs, *depths) for name, file in files.items() if SEED not in file}


def weights_of(settings: Settings, name: str, file: str, outputs: int, target_depths: list[int], meta_depths: list[int]) -> str:
    """Return the SHA-256 of a file of weights that a strategy starts from; SettingsError for one that does not fit."""
    from incubate_lib.phases.networks import build_for
    from incubate_lib.phases.weights import load_into, sha256, weights_file

    depth = sum(meta_depths if settings.strategies[name].is_cut else target_depths) or settings.model.depth
    try:
        load_into(build_for(settings.task, settings.model, depth, outputs), file)
    except SettingsError as error:
        raise SettingsError(f"strategies.{name}.weights: {error}") from None
    return sha256(weights_file(file))
