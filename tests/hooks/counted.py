"""FLOPs of the same networks are counted once in a test run, by whichever process comes first: that takes seconds, and nearly
every test plans the preset smoke anew, in a data folder of its own."""

import hashlib
import json
import os
from pathlib import Path


def once(count):
    """Return what counts, or reads from the folder $TEST_COUNTS what was counted before."""

    def counted(settings, num_images, num_classes):
        from incubate_lib.phases.facts import Facts
        from incubate_lib.training.files import write_json

        if any(strategy.get("weights") for strategy in settings.strategies.values()):  # a file, which may change
            return count(settings, num_images, num_classes)
        small = {
            name: [strategy.get("low_resolution").model_dump(), strategy.is_as_named(name)]
            for name, strategy in settings.strategies.items()
            if strategy.get("low_resolution")
        }
        partition = settings.partition and settings.partition.model_dump()
        key = json.dumps([settings.task, settings.model.model_dump(), partition, small, num_images, num_classes])
        path = Path(os.environ["TEST_COUNTS"]) / hashlib.sha256(key.encode()).hexdigest()
        if not path.exists():
            write_json(path, count(settings, num_images, num_classes).model_dump(mode="json"))
        return Facts.model_validate_json(path.read_text())

    return counted
