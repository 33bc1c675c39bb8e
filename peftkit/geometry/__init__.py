"""A layer's weight as a matrix: its `Shape`, and the `Geometry` that runs the layer with any weight.

May import kernels and errors. Only this room knows Linear from Conv; everything that is here is public to the others.
"""

from peftkit.geometry.layer import CONVOLUTIONS as CONVOLUTIONS
from peftkit.geometry.layer import LAYERS as LAYERS
from peftkit.geometry.layer import Geometry as Geometry
from peftkit.geometry.layer import is_conv1d as is_conv1d
from peftkit.geometry.layer import is_layer as is_layer
from peftkit.geometry.layer import of as of
from peftkit.geometry.shape import Shape as Shape
