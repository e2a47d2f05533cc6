"""`python -m incubate_lib.report.readme` writes README.md's numbers and the list of all comparisons."""

from incubate_lib.report.readme.markers import write

for path in write():
    print(f"wrote {path}")
