"""Run by a test with a /dev/shm of its own: reads ahead as far as it goes, and then to the end. Arguments: folder, workers."""

import os
import sys
import time

from incubate_lib.config import DataSettings, MachineSettings, TrainingSettings
from incubate_lib.data.order import Order
from incubate_lib.data.sets import load_data
from incubate_lib.data.stream import PREFETCH, SHARED_MEMORY, check_shared_memory


def used() -> int:
    there = os.statvfs(SHARED_MEMORY)
    return (there.f_blocks - there.f_bfree) * there.f_frsize


def main(folder: str, workers: int, side: int = 64) -> None:
    recipe = TrainingSettings(batch_size=8, micro_batch=4, epochs=20)
    machine = MachineSettings(workers=workers)
    train, eval_set = load_data(DataSettings(source="folder", folder=folder), shape=(3, side, side), machine=machine)
    check_shared_memory(eval_set, train, recipe)
    order = Order(len(train), recipe, seed=0, steps=60)
    batches = train.batches(order)
    trained = [len(next(batches)[1])]
    while used() < (workers * PREFETCH + 1) * 4 * 3 * side**2:  # until they have read as far ahead as they may
        time.sleep(0.05)
    eval_batches = sum(len(labels) for _, labels in eval_set.eval_batches())
    trained += [len(labels) for _, labels in batches]
    print(f"{eval_batches} judged, {sum(trained)} trained on")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
