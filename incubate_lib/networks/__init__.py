"""Networks that timm lacks: each a file that registers its models with timm's own `register_model`."""

import importlib
import pkgutil
from functools import cache

__path__ = pkgutil.extend_path(__path__, __name__)


@cache
def register_all() -> None:
    """Make all of them known to timm."""
    for member in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{member.name}")
