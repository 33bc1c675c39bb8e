"""Training aids: what an optimiser is given, and bounds on what it makes.

May import wrapping and what is below it; reads live models, no files. Public: `parameter_groups`,
`limit_norms_`, `use_timestep`, `start` and the rules of `recipes/`.
"""

from peftkit.training.contribution import contribution as contribution
from peftkit.training.gate_search import searched_gates as searched_gates
from peftkit.training.groups import parameter_groups as parameter_groups
from peftkit.training.limit_norms import LimitedNorm as LimitedNorm
from peftkit.training.limit_norms import limit_norms_ as limit_norms_
from peftkit.training.recipes import GLAD as GLAD
from peftkit.training.recipes import LISA as LISA
from peftkit.training.recipes import AdaLoRA as AdaLoRA
from peftkit.training.recipes import ALLoRA as ALLoRA
from peftkit.training.recipes import Attachment as Attachment
from peftkit.training.recipes import CompLoRA as CompLoRA
from peftkit.training.recipes import LoRAFA as LoRAFA
from peftkit.training.recipes import LoRAPro as LoRAPro
from peftkit.training.recipes import LoRAProFull as LoRAProFull
from peftkit.training.recipes import Prefixes as Prefixes
from peftkit.training.recipes import Projection as Projection
from peftkit.training.recipes import Recipe as Recipe
from peftkit.training.recipes import Riemannian as Riemannian
from peftkit.training.recipes import SoftThreshold as SoftThreshold
from peftkit.training.scores import explained_variance as explained_variance
from peftkit.training.scores import gradient_energy as gradient_energy
from peftkit.training.starts import StartReport as StartReport
from peftkit.training.starts.start import start as start
from peftkit.training.timesteps import use_timestep as use_timestep
from peftkit.wrapping.spread import spread as spread
