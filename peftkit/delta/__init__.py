"""The structures a weight change can have, one per file. Each knows its algebra and no algorithm."""

from peftkit.delta.base import Delta as Delta
from peftkit.delta.butterfly import Butterfly as Butterfly
from peftkit.delta.channelwise import ChannelScale as ChannelScale
from peftkit.delta.decomposed import Decomposed as Decomposed
from peftkit.delta.dense import Dense as Dense
from peftkit.delta.diagonal import DiagonalLowRank as DiagonalLowRank
from peftkit.delta.hadamard import Hadamard as Hadamard
from peftkit.delta.input_dependent import InputDependent as InputDependent
from peftkit.delta.kron import Kron as Kron
from peftkit.delta.lowrank import LowRank as LowRank
from peftkit.delta.rotation import Rotation as Rotation
