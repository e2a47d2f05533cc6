"""WebDataset shards, timm's `wds/`: `<key>.jpg` beside `<key>.cls` in tar files named by split and wildcards.

timm streams shards; here their index is read once, so that shares, splits, exact resuming and evaluation that counts each
image once work as for any other source.
"""

import glob
import os
import tarfile
from typing import BinaryIO

import numpy as np

from incubate_lib.config import DataSettings, SettingsError
from incubate_lib.data.decode import Names, Shards, open_regular
from incubate_lib.data.folders import Source, folder_of, is_left_behind, numbered

LONGEST_LABEL = 40  # bytes of a .cls file that are read
ENDINGS = ("jpg", "jpeg", "png", "webp")  # of a sample's image
END = bytes(1024)  # of a tar file: two empty blocks


def wds(settings: DataSettings, split: str, download: bool) -> Source:
    """Return the samples of the shards that a split names: a whole name, a pattern, or a part of one."""
    folder = folder_of(settings)
    pattern = split if "*" in split or split.endswith(".tar") else f"*{split}*.tar"
    found = sorted(glob.glob(str(folder / pattern)))
    tars = [tar for tar in found if not is_left_behind(os.path.basename(tar))]
    if not tars:
        raise SettingsError(f"data.folder {folder} has no shards {pattern!r} (data.train_split, data.test_split)")
    places, names, labels = [], [], []
    for which, tar in enumerate(tars):
        for key, (members, text) in _samples(tar).items():
            image = next((members[ending] for ending in ENDINGS if ending in members), None)
            if image is None or "cls" not in members:
                raise SettingsError(f"{tar}: sample {key!r} has {', '.join(members)}; it needs an image and a .cls file")
            places.append((which, image.offset_data, image.size))
            names.append(image.name)
            if not text.isdigit() or len(text) > 18:  # digits of an int64
                raise SettingsError(f"{tar}: {members['cls'].name} holds {text[:20]!r}, not the number of a class")
            labels.append(int(text))
    if not places:
        raise SettingsError(f"data.folder {folder}: the shards {pattern!r} hold no images")
    labels, classes = numbered(labels, f"{settings.source} {split}")
    return Source(labels, classes, opener=Shards(tars, np.array(places), Names(names)))


def _samples(tar: str) -> dict[str, tuple[dict[str, tarfile.TarInfo], bytes]]:
    """Return the members of a shard by key and ending, and how each sample's .cls begins."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    labels: dict[str, bytes] = {}
    try:
        with open_regular(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                parts = [part for part in member.name.split("/") if part.strip(".")]
                if member.isdir() or any(map(is_left_behind, parts)):
                    continue
                if not member.isfile():
                    raise SettingsError(f"{tar}: {member.name} is a link or a device; shards hold the files themselves")
                folder, _, name = member.name.rpartition("/")
                key, _, ending = name.partition(".")
                key = f"{folder}/{key}"
                sample = found.setdefault(key, {})
                if (ending := ending.lower()) in sample:
                    raise SettingsError(f"{tar}: {member.name} is in it twice")
                sample[ending] = member
                if ending == "cls":
                    labels[key] = archive.extractfile(member).read(LONGEST_LABEL).strip()
            _check_end(tar, file, archive.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SettingsError(f"shard {tar} cannot be read: {error}") from None
    return {key: (members, labels.get(key, b"")) for key, members in found.items()}


def _check_end(tar: str, file: BinaryIO, end: int) -> None:
    """Raise SettingsError unless a tar file ends as it must: tarfile itself takes any end between two members for the end."""
    file.seek(end)
    mark = file.read(len(END))
    if mark != END:
        message = "is damaged" if len(mark) == len(END) else "is cut short"
        raise SettingsError(
            f"shard {tar} {message}: there is no end mark (two empty blocks) at byte {end:,}; copy or make it again"
        )
    while rest := file.read(1 << 20):
        if rest != bytes(len(rest)):
            raise SettingsError(f"shard {tar} goes on after its end mark at byte {end:,}: shards cannot be joined by cat")
