"""Messages that more than one place in the tests expects, each written once: who rewords one changes it here.

All are plain text, as it is printed. `match=` takes a pattern: `re.escape` what has brackets in it.
"""

# -- settings, arguments and names -----------------------------------------------------------------------------------------

CASE_ONLY = "differ in case only"
COLUMN = "that is a column of the table"  # the name of an axis
GIVEN_TWICE = "is given twice"
LABEL = "printable characters in one line"  # of the axes and values of a study
MAPPING = "must be a mapping of settings"
NAME = "a name has at most 100 letters (a to z), digits, "
NEGATIVE_SEED = "seed -1 is negative"
NOT_YAML = "is not plain YAML"
NOT_SET_HERE = "is not set here"
NO_PRESET = "is no preset, no .yaml file and no timm model"
NO_PLACE = "a plain name of timm is needed, not a place to load from"
ONE_LINE = "write it on one line"
OWN_NETWORK = "--growth has a network of its own"
PHASE_SAYS_ALL = "which says all; leave preset, overrides, seed, strategy and module_index as they are"
TIME = "write it as minutes, hours:minutes:seconds"
TOO_MANY_VALUES = "it has more than 10000 values"
UNMATCHED = "shares and budget have no meaning without match"


def did_you_mean(name: str) -> str:
    return f"did you mean {name}"


def unknown(what: str, name: str, meant: str) -> str:
    return f"unknown {what} {name!r}; {did_you_mean(meant)}"


def must_be(what: str, value: object, right: str) -> str:
    return f"{what} is {value!r}; it must be {right}"


def no_meaning(fields: str, whom: str) -> str:
    return f"{fields} has no meaning for {whom}"


def unreadable_settings(file: str) -> str:
    return f"cannot read settings file {file}"


def larger_rate(least: str, lr: str) -> str:
    return f"min_lr {least} is larger than lr {lr}"


def undivided(blocks: int) -> str:
    return f"the network's {blocks} blocks cannot be divided"


def own_field(name: str) -> str:
    """An option of the network or of sbatch that is set by a field of its own."""
    return f"{name} is a field of its own"


def set_by_the_workbook(option: str) -> str:
    return f"{option!r} is set by the workbook, or is no long option of sbatch"


def is_for_backend(option: str, backend: str) -> str:
    return f"{option} is for --backend {backend}"


def not_divisible(by: str) -> str:
    return f"is not divisible by {by}"


def phase_of(phase: str, strategy: str) -> str:
    return f"phase {phase} of strategy {strategy}"


def is_matched(name: str, to: str) -> str:
    """FLOPs of a strategy that are those of another."""
    return f"{name} is matched to the cost of {to}"


# -- files, images and labels ----------------------------------------------------------------------------------------------

DATASETS_CANNOT = "Hugging Face datasets cannot read it"
NOT_A_CLASS = "not the number of a class"
SAMPLE_NEEDS = "it needs an image and a .cls file"


def no_train_folder(there: str) -> str:
    return f"no subfolder 'train' but {there}"


def not_there(path: str) -> str:
    return f"{path} is not there"


def not_for_images(field: str, where: str, kind: str) -> str:
    """A field for an augmentation that these images do not have, in a phase."""
    return f"{field} in {where}: not for images that are {kind}"


def source_has(source: str, shape: tuple[int, ...]) -> str:
    return f"{source!r} has {shape}"


def images_to_train_on(images: int, classes: int) -> str:
    return f"{images:,} images to train on in {classes:,} classes"


def assumed(what: str) -> str:
    """Numbers that are those of ImageNet-1K, because nobody gave others; why follows."""
    return f"ASSUMED: {what}, those of ImageNet-1K, because "


def unreadable(images: int) -> str:
    return f"{images} image(s) cannot be read, the first: "


def all_readable(split: str, images: int, classes: int) -> str:
    return f"{split}: {images} images in {classes} classes; {images} can be read, 0 cannot"


def classes_lacking(where: str, names: str) -> str:
    """Classes to evaluate on without an image to train on."""
    return f"{where} has classes that training lacks: {names}"


def no_image(labels: str, unused: int, outputs: int) -> str:
    return f"No image to train on has label {labels}: {unused} of {outputs} outputs of the network have nothing to learn"


def no_number(label: object) -> str:
    return f"label {label!r} is no whole number"


def no_class(label: int) -> str:
    return f"label {label} is no class"


# -- networks and weights --------------------------------------------------------------------------------------------------

GIVE_WEIGHTS = "give a .safetensors file or a folder"
NOT_SOUND = "is not a sound torch checkpoint"
NOT_IN_MODEL = "is not in the model"
UNCOUNTED = "training is not counted here"
UNKNOWN_ROWS = "which rows belong to what is not known"
OTHER_ROWS = "its rows are laid out in another way"
NO_LAYER = "belongs to no layer of its own"
NOT_ALONE = "cannot rest alone"
SAMPLES_DEPEND = "depend on each other"
USED_ELSEWHERE = "is used outside its own layer's call"
TWO_LAYERS = "parameter first.weight is second.weight as well"


def sees(inputs: int) -> str:
    return f"sees {inputs} inputs for 2 images"


def no_cut(place: str) -> str:
    return f"cannot be cut behind {place!r}"


def fails_with(shape: tuple[int, ...]) -> str:
    return f"fails with images of {shape}"


def task_needs(shape: tuple[int, ...]) -> str:
    return f"where the task needs {shape}: one row for each"


def not_finite(name: str, bad: int, count: int) -> str:
    return f"{name} has {bad} of {count} numbers that are NaN or infinite"


def other_class(number: int | str, here: int | str) -> str:
    """A class that has another number in weights than in the images."""
    return f"is number {number}, in these images it is {here}"


def built_with(file: str, field: str, value: object) -> str:
    """What a file beside weights says of the network that they are of."""
    return f"by its {file} (vit_tiny_patch16_224) it has {field} {value}"


def two_units(name: str) -> str:
    return f"belongs to two units; one of them is {name}"


def small_images(strategy: str, pixels: int) -> str:
    return f"{strategy} is not possible: small images of {pixels} pixels"


# -- runs ------------------------------------------------------------------------------------------------------------------

DAMAGED = "its run.json is damaged"
GIVEN_UP = "given up after 3 attempts or more without a step: "
SAVE_FIRST = "save a checkpoint first"
TAKEN_OVER = "another process took over"
NO_RUN = "there is no run of these settings"
OLDER = "of an older version whose results are not used any more"
OTHER_VERSION = "of another version of this package, or damaged"
FIRST_OF_RUN = "the first one of Deep Incubation in the order of `run`"


def not_finished(phases: str) -> str:
    return f"is not finished: {phases}"


def needed_by(run: str) -> str:
    return f"run {run} needs it, too"


def phases_done(done: int, phases: int) -> str:
    return f"{done} of {phases} phases done"


def done_already(done: int, phases: int) -> str:
    return f"{done} of {phases} phases are done already"


def submitted(jobs: int) -> str:
    return f"{jobs} job(s) submitted"


def queued(waiting: int, jobs: int) -> str:
    return f"{waiting} are in Slurm's queue, {submitted(jobs)}"


# -- tables and reports ----------------------------------------------------------------------------------------------------

DEEP_INCUBATION = "Deep Incubation, random start (paper)"
MACHINE_EACH = "With a machine for every module"
META_ALONE = "The meta model alone has "
NOT_BETTER = "not better on average: "
THAN_END_TO_END = "than end to end"


def seeds_better(better: int, seeds: int) -> str:
    return f"{better} of {seeds} seeds better"


def clearly_better(gain: str, seeds: int) -> str:
    """A gain over end to end with every seed."""
    return f"{gain} better {THAN_END_TO_END} (clear at 95 %, {seeds_better(seeds, seeds)})"


def corrected(comparisons: int) -> str:
    return f"Corrected for {comparisons} comparisons (Holm)."


def largest(word: str, comparisons: int, unit: str) -> str:
    return f"largest {word} of {comparisons} comparisons at equal FLOPs, in {unit}: "


def place(device: str, threads: int) -> str:
    return f"{device}, {threads} thread(s)"


def seconds_of(*places: str) -> str:
    return f"Seconds of {len(places)} devices: {'; '.join(places)}."


def grows(exponent: float, verdict: str) -> str:
    """How seconds grow with FLOPs over all sizes, and as much over the largest ones."""
    return f"FLOPs^{exponent:.2f}, over the three largest as FLOPs^{exponent:.2f}: {verdict} than FLOPs do"
