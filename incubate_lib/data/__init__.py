"""Images and their labels: where they come from, in which order, and how they are made ready for a network."""
