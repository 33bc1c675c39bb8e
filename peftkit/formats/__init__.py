"""File formats: dicts of tensors and strings in, the same out. Nothing here knows a module."""
