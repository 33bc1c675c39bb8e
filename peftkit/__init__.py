"""peftkit: adapters for PyTorch that say what ΔW is once; wrap, merge and save follow from it."""

from peftkit import adapters as adapters
from peftkit._version import __version__ as __version__
from peftkit.adapter import Adapter as Adapter
from peftkit.check import CheckReport as CheckReport
from peftkit.check import check as check
from peftkit.delta import Delta as Delta
from peftkit.loading import LoadReport as LoadReport
from peftkit.loading import load as load
from peftkit.merge import MergeReport as MergeReport
from peftkit.merge import merge as merge
from peftkit.merge import restore as restore
from peftkit.plan import Plan as Plan
from peftkit.plan import Rule as Rule
from peftkit.plan import plan as plan
from peftkit.registry import kinds as kinds
from peftkit.registry import register as register
from peftkit.saving import save as save
from peftkit.wrap import adapter_parameters as adapter_parameters
from peftkit.wrap import adapter_state_dict as adapter_state_dict
from peftkit.wrap import disabled as disabled
from peftkit.wrap import enabled as enabled
from peftkit.wrap import project_ as project_
from peftkit.wrap import set_strength as set_strength
from peftkit.wrap import unwrap as unwrap
from peftkit.wrap import wrap as wrap
