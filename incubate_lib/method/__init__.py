"""What the papers say, on top of torch and timm alone: no files, no flags, no clock."""
