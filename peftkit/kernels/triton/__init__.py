"""The kernels in Triton: tile functions, three kernels that take one, their launches. Imported when one first runs."""
