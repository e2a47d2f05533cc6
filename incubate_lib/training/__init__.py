"""The one loop and what it needs: costs, run folders, and the recipes of the phases."""
