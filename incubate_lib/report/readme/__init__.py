"""The numbers of the project's pages: what stands between markers, written from the tracked tables by `incubate figures`."""

from incubate_lib.report.readme.markers import pages, render, write

__all__ = ["pages", "render", "write"]
