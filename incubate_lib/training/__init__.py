"""The one loop and what it needs: devices, costs, run folders."""
