"""A task that not all images are for."""

from typing import Any

from incubate_lib.tasks import Task


class Picky(Task):
    name = "picky"

    def outputs(self, data: Any) -> int:
        raise ValueError("only what has no classes")


TASK = Picky()
