"""Fast paths of structures on a GPU: operators with a torch reference, and Triton kernels that must equal it."""

from peftkit.kernels.choosing import use as use
