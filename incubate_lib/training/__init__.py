"""The one loop and what it needs: data, costs, run folders, and the recipes of the phases."""
