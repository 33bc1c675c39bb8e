"""Adapters and checkpoints on disk: read, save, load, merge, convert, export and inspect files.

`formats` turns bytes into dicts and back, `families` knows model architectures by name, `export` writes what other
programs read. May import wrapping, adapters, delta, geometry, kernels and errors. The public names are peftkit's own:
`peftkit.read`, `save`, `load`, `merge_checkpoint`, `convert`, `export`, …
"""
