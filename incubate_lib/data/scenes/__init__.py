"""Images that show several things at once: their layouts on disk, generated ones, and how networks take them."""
