"""README's numbers: what stands between markers, written from the tracked tables by `incubate figures`."""

from incubate_lib.report.readme.markers import render, write

__all__ = ["render", "write"]
