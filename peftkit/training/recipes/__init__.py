"""Training rules: what happens to gradients before the steps of an optimiser, and to adapters after them.

One rule a file, all by the protocol of `recipe.py`; `pairs.py` has what rules for two factors share.
"""

from peftkit.training.recipes.lora_pro import LoRAPro as LoRAPro
from peftkit.training.recipes.prefixes import Prefixes as Prefixes
from peftkit.training.recipes.recipe import Attachment as Attachment
from peftkit.training.recipes.recipe import Recipe as Recipe
from peftkit.training.recipes.riemannian import Riemannian as Riemannian
from peftkit.training.recipes.soft_threshold import SoftThreshold as SoftThreshold
