"""Structures of a weight change ΔW (m, n), one per file, each with its algebra.

May import geometry, kernels and errors; knows no algorithm, no layer and no file. Public: `Delta`, which says what a
structure must have, `InputDependent` for a change that is no matrix, and the structures below.
"""

import torch
from einops import rearrange

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
from peftkit.delta.selected_rows import SelectedRows as SelectedRows
from peftkit.delta.stack import LowRankStack as LowRankStack
from peftkit.delta.stack import Stack as Stack
from peftkit.delta.stack import StackedDelta as StackedDelta

# einops notes a class of tensors when it first meets it, which torch.compile cannot trace inside a checkpoint
for _each in (torch.zeros(1), torch.nn.Parameter(torch.zeros(1))):
    rearrange(_each, "a -> a")
