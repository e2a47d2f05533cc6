"""A run as it goes on, and runs that are finished, looked into: progress, graphs, curves, widgets."""
