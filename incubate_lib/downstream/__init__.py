"""What stands on a finished network: pyramids, UPerNet, Mask R-CNN; average precision."""
