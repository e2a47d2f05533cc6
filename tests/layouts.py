"""Small sets of images in exactly the layout of each source."""

import gzip
import hashlib
import io
import pickle
import tarfile

import numpy as np
from PIL import Image
from torchvision import datasets

from incubate_lib.cli import main
from incubate_lib.config import DataSettings, MachineSettings, TrainingSettings
from incubate_lib.data.sets import load_data

RNG = np.random.default_rng(0)
HERE = MachineSettings(workers=0)  # no worker processes unless a test is about them
AUGMENTED = TrainingSettings(
    batch_size=4, randaugment="rand-m9-mstd0.5-inc1", erase=0.5, hflip=True, repeats=2, epochs=2, warmup_epochs=0
)


def picture(label: int, size=(20, 24), mode="RGB") -> Image.Image:
    """A noisy picture whose mean brightness tells its class."""
    shape = (*size, 3) if mode == "RGB" else size
    return Image.fromarray((RNG.integers(0, 40, shape) + 60 * label).astype(np.uint8), mode)


def write_folder(root, classes=("ant", "bee", "cat"), train=8, val=4, size=(20, 24), mode="RGB"):
    for split, number in {"train": train, "val": val}.items():
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                picture(label, size, mode).save(root / split / name / f"{i}.png")
    return root


def cifar_files(root, cls):
    """Write the python version's batches; return the class's attributes that hold their MD5 sums, for these other images."""
    fine = cls is datasets.CIFAR100
    folder, number = root / cls.base_folder, 100 if fine else 10
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(entry, size):
        labels = [i % number for i in range(size)]
        data = RNG.integers(0, 256, (size, 3072), dtype=np.uint8)
        return write(entry[0], {"data": data, "fine_labels" if fine else "labels": labels})

    lists = {
        "train_list": [batch(entry, 2 * number) for entry in cls.train_list],
        "test_list": [batch(entry, number) for entry in cls.test_list],
    }
    names = write(cls.meta["filename"], {cls.meta["key"]: [f"class {i}" for i in range(number)]})
    return lists | {"meta": cls.meta | {"md5": names[1]}}


def write_cifar(root, cls, monkeypatch):
    for name, value in cifar_files(root, cls).items():
        monkeypatch.setattr(cls, name, value)
    return root


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def write_fashion(root, zipped: bool):
    folder = root if zipped else root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, number in {"train": 80, "t10k": 20}.items():
        labels = (np.arange(number) % 10).astype(np.uint8)
        images = (RNG.integers(0, 40, (number, 28, 28)) + 20 * labels[:, None, None]).astype(np.uint8)
        for name, array in {f"{part}-images-idx3-ubyte": images, f"{part}-labels-idx1-ubyte": labels}.items():
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    return root


def write_shards(root, classes=3):
    root.mkdir(parents=True)
    number = 0
    for shard in ("train-000000.tar", "train-000001.tar", "val-000000.tar"):
        with tarfile.open(root / shard, "w") as tar:
            for _ in range(4 * classes):
                jpeg = io.BytesIO()
                picture(number % classes).save(jpeg, "JPEG")
                for ending, blob in {"jpg": jpeg.getvalue(), "cls": str(number % classes).encode(), "json": b"{}"}.items():
                    member = tarfile.TarInfo(f"sample{number:05}.{ending}")
                    member.size = len(blob)
                    tar.addfile(member, io.BytesIO(blob))
                number += 1
    return root


def open_folder(tmp_path, shape=(3, 16, 16), **more):
    settings = DataSettings(source="folder", folder=str(tmp_path), **more)
    return load_data(settings, shape=shape, machine=HERE)


def settings_file(folder, more="", size=16):
    return (
        f"data: {{source: folder, folder: '{folder}'{more}}}\n"
        f"model: {{img_size: {size}, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}}\n"
        "partition: {num_modules: 2}\nmachine: {workers: 0}\n"
        "training: {epochs: 1, batch_size: 4, hflip: true, warmup_epochs: 0}\n"
    )


def check(folder, capsys, source="folder", more=""):
    """Return exit status and output, errors included, of `incubate check`."""
    text = settings_file(folder, more).replace("source: folder", f"source: {source}")
    (file := folder.parent / "mine.yaml").write_text(text)
    status = main(["check", str(file)])
    output = capsys.readouterr()
    return status, output.out + output.err


def png() -> bytes:
    buffer = io.BytesIO()
    picture(0, (16, 16)).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar, files):
    for name, blob in files.items():
        member = tarfile.TarInfo(name)
        member.size = len(blob)
        tar.addfile(member, io.BytesIO(blob))
