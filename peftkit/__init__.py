"""peftkit: adapters for PyTorch that say what ΔW is once; wrap, merge, save and export follow from it.

Every name is imported when it is first used: help and completion of the command need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from peftkit._version import __version__ as __version__

__all__ = [
    "Adapter",
    "CheckReport",
    "ConvertReport",
    "Delta",
    "ExportReport",
    "ExtractReport",
    "Inspection",
    "LoadReport",
    "MergePlan",
    "MergeReport",
    "Plan",
    "Rule",
    "__version__",
    "adapter_parameters",
    "adapter_state_dict",
    "adapters",
    "check",
    "combine",
    "convert",
    "delta",
    "describe",
    "diff",
    "disabled",
    "doctor",
    "enabled",
    "errors",
    "export",
    "extract",
    "inspect",
    "kernels",
    "kinds",
    "limit_norms_",
    "load",
    "merge",
    "merge_checkpoint",
    "monitor",
    "parameter_groups",
    "plan",
    "plan_merge",
    "preset_rules",
    "project_",
    "read",
    "register",
    "rescale",
    "reset_adapters",
    "resize",
    "resize_",
    "restore",
    "save",
    "set_strength",
    "start",
    "swap",
    "testing",
    "training",
    "unwrap",
    "wrap",
]

if TYPE_CHECKING:
    from peftkit import adapters as adapters
    from peftkit import delta as delta
    from peftkit import errors as errors
    from peftkit import kernels as kernels
    from peftkit import monitor as monitor
    from peftkit import testing as testing
    from peftkit import training as training
    from peftkit.adapters.base import Adapter as Adapter
    from peftkit.adapters.describe import describe as describe
    from peftkit.adapters.registry import kinds as kinds
    from peftkit.adapters.registry import register as register
    from peftkit.delta import Delta as Delta
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
    from peftkit.files.swap import swap as swap
    from peftkit.training.groups import parameter_groups as parameter_groups
    from peftkit.training.limit_norms import limit_norms_ as limit_norms_
    from peftkit.training.starts.start import start as start
    from peftkit.wrapping.check import CheckReport as CheckReport
    from peftkit.wrapping.check import check as check
    from peftkit.wrapping.merge import MergeReport as MergeReport
    from peftkit.wrapping.merge import merge as merge
    from peftkit.wrapping.merge import restore as restore
    from peftkit.wrapping.plan import Plan as Plan
    from peftkit.wrapping.plan import plan as plan
    from peftkit.wrapping.preset_rules import preset_rules as preset_rules
    from peftkit.wrapping.resize import resize_ as resize_
    from peftkit.wrapping.rule import Rule as Rule
    from peftkit.wrapping.strength import disabled as disabled
    from peftkit.wrapping.strength import enabled as enabled
    from peftkit.wrapping.strength import set_strength as set_strength
    from peftkit.wrapping.wrap import adapter_parameters as adapter_parameters
    from peftkit.wrapping.wrap import adapter_state_dict as adapter_state_dict
    from peftkit.wrapping.wrap import project_ as project_
    from peftkit.wrapping.wrap import reset_adapters as reset_adapters
    from peftkit.wrapping.wrap import unwrap as unwrap
    from peftkit.wrapping.wrap import wrap as wrap

_PUBLIC = {
    "peftkit.adapters.base": ("Adapter",),
    "peftkit.adapters.describe": ("describe",),
    "peftkit.adapters.registry": (
        "kinds",
        "register",
    ),
    "peftkit.delta": ("Delta",),
    "peftkit.files.combine": ("combine",),
    "peftkit.files.convert": (
        "ConvertReport",
        "convert",
        "resize",
    ),
    "peftkit.files.export.export": (
        "ExportReport",
        "export",
    ),
    "peftkit.files.extract": (
        "ExtractReport",
        "extract",
    ),
    "peftkit.files.inspect": (
        "Inspection",
        "diff",
        "doctor",
        "inspect",
    ),
    "peftkit.files.load": (
        "LoadReport",
        "load",
    ),
    "peftkit.files.merge": ("merge_checkpoint",),
    "peftkit.files.merge_plan": (
        "MergePlan",
        "plan_merge",
    ),
    "peftkit.files.read": ("read",),
    "peftkit.files.rescale": ("rescale",),
    "peftkit.files.save": ("save",),
    "peftkit.files.swap": ("swap",),
    "peftkit.training.groups": ("parameter_groups",),
    "peftkit.training.limit_norms": ("limit_norms_",),
    "peftkit.training.starts.start": ("start",),
    "peftkit.wrapping.check": (
        "CheckReport",
        "check",
    ),
    "peftkit.wrapping.merge": (
        "MergeReport",
        "merge",
        "restore",
    ),
    "peftkit.wrapping.plan": (
        "Plan",
        "Rule",
        "plan",
    ),
    "peftkit.wrapping.preset_rules": ("preset_rules",),
    "peftkit.wrapping.resize": ("resize_",),
    "peftkit.wrapping.strength": (
        "disabled",
        "enabled",
        "set_strength",
    ),
    "peftkit.wrapping.wrap": (
        "adapter_parameters",
        "adapter_state_dict",
        "project_",
        "reset_adapters",
        "unwrap",
        "wrap",
    ),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}
_PACKAGES = ("adapters", "delta", "errors", "kernels", "monitor", "testing", "training")


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return import_module(f"peftkit.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return list(__all__)
