"""A task that not all images are for."""

from incubate_lib.tasks import Task


class Picky(Task):
    name = "picky"

    def outputs(self, num_classes: int) -> int:
        raise ValueError("only what has no classes")


TASK = Picky()
