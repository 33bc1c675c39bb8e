"""What goes into the header of an exported file: kohya's ss_ entries, Stability's modelspec, hashes, and our own."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftkit._version import __version__
from peftkit.errors import OptionError
from peftkit.files.export.programs import Target
from peftkit.files.families.family import Family
from peftkit.files.formats import container

#: our own entry: how each weight was written
KEY = "peftkit_export"

#: entries that WebUIs parse: as a number, and as JSON
_NUMBERS = ("ss_training_started_at", "ss_training_finished_at")
_JSON = ("ss_bucket_info", "ss_dataset_dirs", "ss_tag_frequency", "ss_network_args", "ssmd_cover_images")


#: entries that are computed, or that make a reader take the file for another format
_OURS = ("sshs_model_hash", "sshs_legacy_hash", "peftkit", "lora_adapter_metadata", "format")


def build(
    tensors: Mapping[str, Tensor],
    target: Target,
    family: Family | None,
    title: str,
    rank: int | None,
    alpha: float | None,
    training: Mapping[str, Any],
    own: Mapping[str, Any],
) -> dict[str, str]:
    """Return all entries of the header of a file. The same arguments give the same entries: there is no clock.

    training: the user's, which may add to or replace any entry but the hashes; values that are not text become JSON.
    """
    entries = {KEY: _text(KEY, {"version": __version__, "target": target.name, **own})}
    if target.kohya_metadata:
        entries |= _kohya(tensors, title, rank, alpha)
    if family is not None:
        entries |= {
            "ss_base_model_version": family.base_model_version,
            "ss_v2": str(family.name == "sd2"),
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{family.architecture}/lora",
            "modelspec.implementation": family.implementation,
            "modelspec.title": title,
            "modelspec.resolution": family.resolution,
        }
    entries |= {str(name): _text(str(name), value) for name, value in training.items()}
    return entries | hashes(tensors, entries)


def hashes(tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> dict[str, str]:
    """Return sshs_model_hash and sshs_legacy_hash, as WebUIs compute them.

    The first is of the tensors' bytes, the second of 64 KiB at 1 MiB of a file with only ss_ entries.
    """
    file = io.BytesIO()
    container.emit(file, tensors, {name: value for name, value in entries.items() if name.startswith("ss_")})
    view = file.getbuffer()
    data = 8 + int.from_bytes(view[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(view[data:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(view[1 << 20 : (1 << 20) + (1 << 16)]).hexdigest()[:8],
    }


def _kohya(tensors: Mapping[str, Tensor], title: str, rank: int | None, alpha: float | None) -> dict[str, str]:
    lycoris = any(".lora_" not in name and not name.endswith(".alpha") for name in tensors)
    entries = {
        "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        "ss_output_name": title,
    }
    if rank is not None:
        entries |= {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    return entries


def _text(name: str, value: Any) -> str:
    """An entry as text, refused where a WebUI would fail on it."""
    if name in _OURS:
        raise OptionError(f"{name}={value!r:.100} was given; it says what the tensors are, leave it out")
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
        if name in _NUMBERS and not math.isfinite(float(text)):
            raise ValueError("not a finite number")
        if name in _JSON:
            json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        expected = "a number" if name in _NUMBERS else "JSON"
        raise OptionError(f"training has {name}={value!r:.100}, {expected} was expected: {error}") from None
    return text
