"""peftkit: adapters for PyTorch that say what ΔW is once; wrap, merge, save and export follow from it.

What works on files is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peftkit import adapters as adapters
from peftkit._version import __version__ as __version__
from peftkit.adapters.base import Adapter as Adapter
from peftkit.adapters.registry import kinds as kinds
from peftkit.adapters.registry import register as register
from peftkit.delta import Delta as Delta
from peftkit.wrapping.check import CheckReport as CheckReport
from peftkit.wrapping.check import check as check
from peftkit.wrapping.merge import MergeReport as MergeReport
from peftkit.wrapping.merge import merge as merge
from peftkit.wrapping.merge import restore as restore
from peftkit.wrapping.plan import Plan as Plan
from peftkit.wrapping.plan import Rule as Rule
from peftkit.wrapping.plan import plan as plan
from peftkit.wrapping.strength import disabled as disabled
from peftkit.wrapping.strength import enabled as enabled
from peftkit.wrapping.strength import set_strength as set_strength
from peftkit.wrapping.wrap import adapter_parameters as adapter_parameters
from peftkit.wrapping.wrap import adapter_state_dict as adapter_state_dict
from peftkit.wrapping.wrap import project_ as project_
from peftkit.wrapping.wrap import unwrap as unwrap
from peftkit.wrapping.wrap import wrap as wrap

if TYPE_CHECKING:
    from peftkit import monitor as monitor
    from peftkit.files.combine import combine as combine
    from peftkit.files.convert import ConvertReport as ConvertReport
    from peftkit.files.convert import convert as convert
    from peftkit.files.convert import resize as resize
    from peftkit.files.export.export import ExportReport as ExportReport
    from peftkit.files.export.export import export as export
    from peftkit.files.extract import ExtractReport as ExtractReport
    from peftkit.files.extract import extract as extract
    from peftkit.files.inspect import Inspection as Inspection
    from peftkit.files.inspect import diff as diff
    from peftkit.files.inspect import doctor as doctor
    from peftkit.files.inspect import inspect as inspect
    from peftkit.files.load import LoadReport as LoadReport
    from peftkit.files.load import load as load
    from peftkit.files.merge import merge_checkpoint as merge_checkpoint
    from peftkit.files.merge_plan import MergePlan as MergePlan
    from peftkit.files.merge_plan import plan_merge as plan_merge
    from peftkit.files.read import read as read
    from peftkit.files.rescale import rescale as rescale
    from peftkit.files.save import save as save

_ON_FILES = {
    "peftkit.files.merge": ("merge_checkpoint",),
    "peftkit.files.combine": ("combine",),
    "peftkit.files.convert": ("ConvertReport", "convert", "resize"),
    "peftkit.files.export.export": ("ExportReport", "export"),
    "peftkit.files.extract": ("ExtractReport", "extract"),
    "peftkit.files.inspect": ("Inspection", "diff", "doctor", "inspect"),
    "peftkit.files.load": ("LoadReport", "load"),
    "peftkit.files.merge_plan": ("MergePlan", "plan_merge"),
    "peftkit.files.read": ("read",),
    "peftkit.files.rescale": ("rescale",),
    "peftkit.files.save": ("save",),
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
