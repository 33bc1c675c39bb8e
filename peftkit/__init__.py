"""peftkit: adapters for PyTorch that say what ΔW is once; wrap, merge, save and export follow from it.

What works on files is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peftkit import adapters as adapters
from peftkit._version import __version__ as __version__
from peftkit.adapter import Adapter as Adapter
from peftkit.check import CheckReport as CheckReport
from peftkit.check import check as check
from peftkit.delta import Delta as Delta
from peftkit.merge import MergeReport as MergeReport
from peftkit.merge import merge as merge
from peftkit.merge import restore as restore
from peftkit.plan import Plan as Plan
from peftkit.plan import Rule as Rule
from peftkit.plan import plan as plan
from peftkit.registry import kinds as kinds
from peftkit.registry import register as register
from peftkit.wrap import adapter_parameters as adapter_parameters
from peftkit.wrap import adapter_state_dict as adapter_state_dict
from peftkit.wrap import disabled as disabled
from peftkit.wrap import enabled as enabled
from peftkit.wrap import project_ as project_
from peftkit.wrap import set_strength as set_strength
from peftkit.wrap import unwrap as unwrap
from peftkit.wrap import wrap as wrap

if TYPE_CHECKING:
    from peftkit import monitor as monitor
    from peftkit.checkpoint import merge_checkpoint as merge_checkpoint
    from peftkit.combining import combine as combine
    from peftkit.converting import ConvertReport as ConvertReport
    from peftkit.converting import convert as convert
    from peftkit.converting import resize as resize
    from peftkit.exporting import ExportReport as ExportReport
    from peftkit.exporting import export as export
    from peftkit.extracting import ExtractReport as ExtractReport
    from peftkit.extracting import extract as extract
    from peftkit.inspection import Inspection as Inspection
    from peftkit.inspection import diff as diff
    from peftkit.inspection import doctor as doctor
    from peftkit.inspection import inspect as inspect
    from peftkit.loading import LoadReport as LoadReport
    from peftkit.loading import load as load
    from peftkit.merge_plan import MergePlan as MergePlan
    from peftkit.merge_plan import plan_merge as plan_merge
    from peftkit.reading import read as read
    from peftkit.rescaling import rescale as rescale
    from peftkit.saving import save as save

_ON_FILES = {
    "peftkit.checkpoint": ("merge_checkpoint",),
    "peftkit.combining": ("combine",),
    "peftkit.converting": ("ConvertReport", "convert", "resize"),
    "peftkit.exporting": ("ExportReport", "export"),
    "peftkit.extracting": ("ExtractReport", "extract"),
    "peftkit.inspection": ("Inspection", "diff", "doctor", "inspect"),
    "peftkit.loading": ("LoadReport", "load"),
    "peftkit.merge_plan": ("MergePlan", "plan_merge"),
    "peftkit.reading": ("read",),
    "peftkit.rescaling": ("rescale",),
    "peftkit.saving": ("save",),
}
_MODULES = {name: module for module, names in _ON_FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "monitor":
        return import_module("peftkit.monitor")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "monitor"})
