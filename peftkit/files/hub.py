"""Adapters on the Hugging Face hub: fetched into its cache by name, and pushed with a card that says what they are."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from peftkit.errors import AmbiguousFileError, FileError, OptionError
from peftkit.files.formats import peft

SCHEME = "hf://"
#: a name on the hub, "owner/name"; a path of this form that is there is a path
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
#: endings of files, which no repository has at the end of its name
_FILES = (".safetensors", ".json", ".bin", ".pt", ".ckpt", ".pth", ".gguf")


@dataclass(frozen=True)
class Reference:
    """A repository of the hub, the file or the folder in it that is meant ("" for its own), and the revision."""

    repository: str
    within: str = ""
    revision: str | None = None

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Reference | None:
        """Return what a path means on the hub, None for a path of this machine.

        Raises:
            OptionError: a reference that names no repository.
        """
        if not isinstance(path, str):
            return None
        if not path.startswith(SCHEME):
            local = os.path.exists(path) or path.endswith(_FILES) or not _NAME.fullmatch(path)
            return None if local else cls(path)
        name, _, revision = path.removeprefix(SCHEME).partition("@")
        owner, _, rest = name.partition("/")
        repository, _, within = rest.partition("/")
        if not _NAME.fullmatch(f"{owner}/{repository}"):
            raise OptionError(f"{path} was given, hf://owner/name, hf://owner/name/file or …@revision was expected")
        return cls(f"{owner}/{repository}", within.strip("/"), revision or None)


def local(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return where an adapter is on this machine, which is fetched from the hub if the path says so.

    Only safetensors files and their configuration are fetched, never a pickle.

    Args:
        path: a path of this machine, "owner/name", or "hf://owner/name/file@revision", of which file and revision may
            be left out.

    Raises:
        FileError: the hub has no such repository, revision or adapter, or cannot be reached.
        AmbiguousFileError: the repository has several adapters.
        OptionError: huggingface_hub is not installed.
    """
    reference = Reference.of(path)
    if reference is None:
        return path
    hub = _library(str(path))
    try:
        return _fetched(str(path), reference, hub)
    except hub.errors.HFValidationError as error:
        raise OptionError(f"{path} is no name of the hub: {_said(error)}") from error
    except (hub.errors.HTTPError, OSError) as error:  # LocalEntryNotFoundError and OfflineModeIsEnabled are OSErrors
        raise FileError(
            f"{path} was not fetched from the hub: {_said(error)}. A path of this machine was not found under this "
            "name either; a repository that is not public needs `hf auth login` or HF_TOKEN"
        ) from error


def _fetched(path: str, reference: Reference, hub: Any) -> str:
    api = hub.HfApi()
    wanted = _wanted(path, reference, _names(reference, api, hub.errors.OfflineModeIsEnabled))
    fetched = [api.hf_hub_download(reference.repository, name, revision=reference.revision) for name in wanted]
    return os.path.dirname(fetched[0]) if len(fetched) > 1 else fetched[0]


def _names(reference: Reference, api: Any, offline: type[Exception]) -> list[str]:
    """The files of a repository, those in the cache where the hub may not be asked. offline: the error that says so."""
    try:
        return api.list_repo_files(reference.repository, revision=reference.revision)
    except offline:
        folder = Path(api.snapshot_download(reference.repository, revision=reference.revision, local_files_only=True))
        return [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]


def _wanted(path: str, reference: Reference, names: Sequence[str]) -> list[str]:
    """The files to fetch: the weights, and PEFT's configuration beside them."""
    within = PurePosixPath(reference.within)
    here = [name for name in names if not reference.within or PurePosixPath(name).is_relative_to(within)]
    weights = [name for name in here if name.endswith(".safetensors")]
    folder = [name for name in weights if PurePosixPath(name).name == peft.WEIGHTS]
    weights = folder[:1] if len(folder) == 1 else weights
    if not here:
        raise FileError(f"{path}: {reference.repository} has no {reference.within!r}; it has {_few(names)}")
    if not weights:
        raise FileError(
            f"{path}: no safetensors file is there, and nothing else is fetched from the hub; it has {_few(here)}"
        )
    if len(weights) > 1:
        several = _few([f"{SCHEME}{reference.repository}/{name}" for name in weights])
        raise AmbiguousFileError(f"{path} has {len(weights)} safetensors files: name one of {several}")
    config = str(PurePosixPath(weights[0]).with_name(peft.CONFIG))
    beside = config in names and PurePosixPath(weights[0]).name == peft.WEIGHTS
    return [*weights, config] if beside else weights


# -- pushing -----------------------------------------------------------------------------------------------------------


def push(
    path: Path, repository: str, card: str, *, private: bool | None = None, message: str = "Add an adapter"
) -> str:
    """Upload an adapter and its card to the hub in one commit, and return the address of the commit.

    Args:
        path: a file or a folder of PEFT.
        repository: "owner/name"; it is created where there is none.
        card: the text of its README.md.
        private: whether a new repository is, None for what the owner's account says.
        message: of the commit.

    Raises:
        FileError: the hub does not take it.
        OptionError: no name of a repository, or huggingface_hub is not installed.
    """
    require_repository(repository)
    hub = _library(repository)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    operations = [hub.CommitOperationAdd(file.name, str(file)) for file in files]
    operations.append(hub.CommitOperationAdd("README.md", card.encode()))
    api = hub.HfApi()
    try:
        api.create_repo(repository, exist_ok=True, private=private)
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)
    except (hub.errors.HTTPError, OSError) as error:
        raise FileError(
            f"{path} is written, and {repository} did not take it: {_said(error)}. `hf auth login` or HF_TOKEN lets "
            "this machine write; `hf upload` uploads the file later"
        ) from error


def require_repository(name: str) -> None:
    """Refuse what is no name of a repository, before anything is written."""
    if not _NAME.fullmatch(name):
        raise OptionError(f"push={name!r} was given, 'owner/name' of a repository on the hub was expected")
    _library(name)


def model_card(title: str, facts: Mapping[str, Any], lines: Sequence[str]) -> str:
    """Return a README.md of the hub.

    Args:
        title: its heading.
        facts: entries of its metadata, such as base_model, license and tags; those that are None are left out.
        lines: what it says, in Markdown.
    """
    said = {key: value for key, value in facts.items() if value is not None}
    head = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in said.items()]  # JSON is YAML
    return "\n".join(["---", *head, "---", "", f"# {title}", "", *lines, ""])


def _library(path: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise OptionError(
            f"{path} is not on this machine, and huggingface_hub, which asks the hub for it, is not installed: "
            "pip install 'peftkit[hub]'"
        ) from error
    return huggingface_hub


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")


def _said(error: Exception) -> str:
    """The first line of another library's error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
