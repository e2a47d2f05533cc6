"""The one loop and what it needs: images, devices, costs, run folders."""
