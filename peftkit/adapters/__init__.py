"""The algorithms, parameters -> ΔW, one per file; importing a file registers its kind.

May import delta, geometry, kernels and errors; knows no model and no file. Public: the classes below, `Adapter` to
derive from, `register` to name a kind, and `factory` for its parameters.
"""

from peftkit.adapters.anchored import AnchoredLoRA as AnchoredLoRA
from peftkit.adapters.base import Adapter as Adapter
from peftkit.adapters.block_lora import BlockLoRA as BlockLoRA
from peftkit.adapters.boft import BOFT as BOFT
from peftkit.adapters.dora import DoRA as DoRA
from peftkit.adapters.dylora import DyLoRA as DyLoRA
from peftkit.adapters.fourierft import FourierFT as FourierFT
from peftkit.adapters.full import Full as Full
from peftkit.adapters.glora import GLoRA as GLoRA
from peftkit.adapters.ia3 import IA3 as IA3
from peftkit.adapters.loha import LoHa as LoHa
from peftkit.adapters.lokr import LoKr as LoKr
from peftkit.adapters.loldu import LoLDU as LoLDU
from peftkit.adapters.lora import LoRA as LoRA
from peftkit.adapters.lora_fa import LoRAFA as LoRAFA
from peftkit.adapters.lora_xs import LoRAXS as LoRAXS
from peftkit.adapters.melora import MELoRA as MELoRA
from peftkit.adapters.miss import MiSS as MiSS
from peftkit.adapters.mora import MoRA as MoRA
from peftkit.adapters.moslora import MosLoRA as MosLoRA
from peftkit.adapters.oft import OFT as OFT
from peftkit.adapters.options import factory as factory
from peftkit.adapters.randlora import RandLoRA as RandLoRA
from peftkit.adapters.registry import register as register
from peftkit.adapters.svdiff import SVDiff as SVDiff
from peftkit.adapters.svdlora import SVDLoRA as SVDLoRA
from peftkit.adapters.svft import SVFT as SVFT
from peftkit.adapters.t_lora import TLoRA as TLoRA
from peftkit.adapters.tied_lora import TiedLoRA as TiedLoRA
from peftkit.adapters.tiny_lora import TinyLoRA as TinyLoRA
from peftkit.adapters.vb_lora import VBLoRA as VBLoRA
from peftkit.adapters.vera import VeRA as VeRA
