"""All but this stands in pyproject.toml: a wheel takes along the notebooks, which lie beside the package in the project."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithNotebooks(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # else they are found where they lie
            for notebook in Path("notebooks").glob("*.ipynb"):
                target = Path(self.build_lib, "incubate_lib", notebook)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(notebook, target)


setup(cmdclass={"build_py": WithNotebooks})
