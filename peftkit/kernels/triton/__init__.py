"""The kernels in Triton: tile functions, three kernels that take one, their launches. Imported when one first runs."""

import triton

#: the oldest release with all that the kernels use
OLDEST = (3, 3)

if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
    raise ImportError(f"Triton {triton.__version__} is installed and the kernels need 3.3, which comes with torch 2.7")
