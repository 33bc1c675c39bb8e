"""Adapters on a live model: choose its layers, wrap them, set strengths, merge, restore and check.

May import adapters, delta, geometry, kernels and errors. The public names are peftkit's own: `peftkit.plan`, `wrap`,
`unwrap`, `merge`, `restore`, `check`, …
"""
