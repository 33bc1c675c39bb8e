"""Adapters are fetched from the hub by name and pushed to it: no pickle, each answer of the hub a clear error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import AmbiguousFileError, FileError, MismatchError, OptionError
from peftkit.files.hub import Reference
from tests.support.hub import Hub, served
from tests.support.zoo import train


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with served() as hub:
        address = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)  # as HF_ENDPOINT does at the import
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield hub


def trained(kind: str = "lora") -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    pk.wrap(model, kind, targets="0")
    train(model)
    return model


def plain(model: nn.Module) -> nn.Module:
    """The same base without an adapter."""
    base = nn.Sequential(nn.Linear(8, 8))
    base.load_state_dict({key: value for key, value in model.state_dict().items() if ".adapters." not in key})
    return base


def outputs(model: nn.Module) -> Tensor:
    return model(torch.ones(2, 8)).detach()


def content(model: nn.Module, folder: Path) -> bytes:
    return pk.save(model, folder / "own.safetensors").read_bytes()


@pytest.mark.parametrize(
    "path", ["me/style", "hf://me/style", "hf://me/style/style.safetensors", "hf://me/style@main", "hf://me/style@v1"]
)
def test_an_adapter_is_loaded_by_its_name(path: str, hub: Hub, tmp_path: Path) -> None:
    model = trained()
    files = {"style.safetensors": content(model, tmp_path), "README.md": b"# style", "old.bin": b"\x80"}
    hub.repositories["me/style"] = files
    hub.revisions["me/style", "v1"] = files
    base = plain(model)
    assert pk.load(base, path).loaded == ("0",)
    assert torch.equal(outputs(base), outputs(model))
    assert not any("old.bin" in asked for asked in hub.asked)
    assert not any(asked.endswith("README.md") for asked in hub.asked)


def test_a_folder_of_peft_is_loaded_with_its_configuration(hub: Hub, tmp_path: Path) -> None:
    model = trained()
    pk.export(model, tmp_path / "peft", "peft")
    own = {file.name: file.read_bytes() for file in (tmp_path / "peft").iterdir()}
    hub.repositories["me/many"] = {f"{step}/{name}": held for step in ("last", "best") for name, held in own.items()}
    base = plain(model)
    pk.load(base, "hf://me/many/best")
    assert torch.allclose(outputs(base), outputs(model), atol=1e-6)
    with pytest.raises(AmbiguousFileError, match=r"hf://me/many/last/adapter_model\.safetensors"):
        pk.read("me/many")
    assert pk.read("hf://me/many/last/adapter_model.safetensors").format == "peft"


def test_every_function_that_reads_takes_a_name(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["me/style"] = {"style.safetensors": content(trained(), tmp_path)}
    assert pk.inspect("me/style").modules[0].kind == "lora"
    assert pk.diff("me/style", tmp_path / "own.safetensors").equal
    pk.export("me/style", tmp_path / "peft", "peft")
    pk.combine({"me/style": 0.5, tmp_path / "own.safetensors": 0.5}, tmp_path / "half.safetensors")


@pytest.mark.parametrize(
    "path, said",
    [
        ("me/none", "me/none was not fetched from the hub"),
        ("hf://me/style@v9", "was not fetched from the hub"),
        ("hf://me/style/other.safetensors", "me/style has no 'other.safetensors'; it has style.safetensors"),
        ("me/pickles", "no safetensors file is there, and nothing else is fetched"),
    ],
)
def test_what_the_hub_has_not_is_said(path: str, said: str, hub: Hub, tmp_path: Path) -> None:
    hub.repositories["me/style"] = {"style.safetensors": content(trained(), tmp_path)}
    hub.repositories["me/pickles"] = {"pytorch_lora_weights.bin": b"\x80"}
    with pytest.raises(FileError, match=said):
        pk.read(path)


def test_a_file_of_the_hub_is_trusted_no_more_than_another(hub: Hub) -> None:
    hub.repositories["me/hostile"] = {"style.safetensors": b"\xff" * 64}
    with pytest.raises(FileError):
        pk.read("me/hostile")
    hub.repositories["me/other"] = {"model.safetensors": _safetensors()}
    with pytest.raises(MismatchError):
        pk.read("me/other")


def _safetensors() -> bytes:
    from safetensors.torch import save

    return save({"weight": torch.zeros(2, 2)})


def test_a_name_that_is_a_path_is_a_path(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    pk.export(trained(), tmp_path / "me" / "style", "peft")
    assert pk.read("me/style").format == "peft"
    assert hub.asked == []
    with pytest.raises(FileError, match="no_such"):
        pk.read("me/no_such.safetensors")
    assert hub.asked == []


def test_references() -> None:
    assert Reference.of("hf://me/a.b/c/d.safetensors@v1") == Reference("me/a.b", "c/d.safetensors", "v1")
    assert Reference.of("me/style") == Reference("me/style")
    assert Reference.of(Path("me/style")) is Reference.of("./me/style") is Reference.of("a/b/c") is None
    with pytest.raises(OptionError, match="hf://owner/name"):
        Reference.of("hf://style")


def test_the_cache_serves_where_the_hub_is_not_reached(tmp_path: Path) -> None:
    """Through HF_ENDPOINT, in a process of its own: fetched once, and offline from the cache."""
    model = trained()
    code = "import peftkit as pk; print(pk.read('me/style').patches['0'].kind)"
    with served() as hub:
        hub.repositories["me/style"] = {"style.safetensors": content(model, tmp_path)}
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}
        for offline in ("0", "1"):
            environment["HF_HUB_OFFLINE"] = offline
            done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
            assert done.stdout.strip() == "lora", done.stderr


# -- pushing -----------------------------------------------------------------------------------------------------------


def test_an_adapter_is_pushed_with_its_card(hub: Hub, tmp_path: Path) -> None:
    model = trained("dora")
    facts = {"license": "apache-2.0", "base_model": "me/base"}
    pk.save(model, tmp_path / "style.safetensors", push="me/style", card=facts)
    held = hub.repositories["me/style"]
    assert held["style.safetensors"] == (tmp_path / "style.safetensors").read_bytes()
    card = held["README.md"].decode()
    assert card.startswith("---\n")
    assert 'license: "apache-2.0"' in card
    assert 'base_model: "me/base"' in card
    assert 'library_name: "peftkit"' in card
    assert "| `0` | dora |" in card
    base = plain(model)
    pk.load(base, "me/style")
    assert torch.equal(outputs(base), outputs(model))


def test_what_cannot_be_pushed_is_said_before_anything_is_written(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match="owner/name"):
        pk.save(trained(), tmp_path / "style.safetensors", push="style")
    with pytest.raises(OptionError, match="card= was given"):
        pk.save(trained(), tmp_path / "style.safetensors", card={"license": "mit"})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileError, match="hf auth login"):
        pk.save(trained(), tmp_path / "style.safetensors", push="me/style")
    assert (tmp_path / "style.safetensors").exists()  # the message says so
    assert "me/style" not in hub.repositories


def test_the_command_takes_a_name(tmp_path: Path) -> None:
    with served() as hub:
        hub.repositories["me/style"] = {"style.safetensors": content(trained(), tmp_path)}
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "peftkit", "inspect", "me/style"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "lora" in done.stdout
