"""Deep Incubation workbook: train large vision models in pieces. The notebooks are the face; this is their engine."""

__version__ = "0.1.0"
