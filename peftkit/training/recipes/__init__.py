"""Training rules: what happens to gradients before the steps of an optimiser, and to adapters after them.

One rule a file, all by the protocol of `recipe.py`; `pairs.py` has what rules for two factors share.
"""

from peftkit.training.recipes.adalora import AdaLoRA as AdaLoRA
from peftkit.training.recipes.allora import ALLoRA as ALLoRA
from peftkit.training.recipes.comp_lora import CompLoRA as CompLoRA
from peftkit.training.recipes.glad import GLAD as GLAD
from peftkit.training.recipes.lisa import LISA as LISA
from peftkit.training.recipes.lora_fa import LoRAFA as LoRAFA
from peftkit.training.recipes.lora_pro import LoRAPro as LoRAPro
from peftkit.training.recipes.lora_pro_full import LoRAProFull as LoRAProFull
from peftkit.training.recipes.prefixes import Prefixes as Prefixes
from peftkit.training.recipes.projection import Projection as Projection
from peftkit.training.recipes.recipe import Attachment as Attachment
from peftkit.training.recipes.recipe import Recipe as Recipe
from peftkit.training.recipes.riemannian import Riemannian as Riemannian
from peftkit.training.recipes.soft_threshold import SoftThreshold as SoftThreshold
