"""What carries over: networks on top of a finished one, and images with what is seen where in them."""
