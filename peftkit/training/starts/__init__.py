"""Starts: the factors that an adapter begins with, one file each.

`start` is the verb; `protocol.py` is what a start is: from what was seen of a weight to B₀ and A₀.
"""

from peftkit.training.starts.corda import CorDA as CorDA
from peftkit.training.starts.eva import EVA as EVA
from peftkit.training.starts.loftq import LoftQ as LoftQ
from peftkit.training.starts.lora_ga import LoRAGA as LoRAGA
from peftkit.training.starts.lora_one import LoRAOne as LoRAOne
from peftkit.training.starts.lora_sb import LoRASB as LoRASB
from peftkit.training.starts.of_base import MiLoRA as MiLoRA
from peftkit.training.starts.of_base import OLoRA as OLoRA
from peftkit.training.starts.of_base import PiSSA as PiSSA
from peftkit.training.starts.orthogonal import Orthogonal as Orthogonal
from peftkit.training.starts.protocol import Factors as Factors
from peftkit.training.starts.protocol import Seen as Seen
from peftkit.training.starts.protocol import Start as Start
from peftkit.training.starts.report import StartReport as StartReport
