"""`python -m incubate_lib.cli …` is `incubate …`."""

import sys

from incubate_lib.cli import main

if __name__ == "__main__":
    sys.exit(main())
