"""Deep Incubation workbook: train large vision models in pieces. The notebooks are the face; this is their engine."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)  # other packages may have members, see config.members

__version__ = "0.1.0"
