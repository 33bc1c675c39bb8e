"""Files: strict, proven alive, all or nothing, and never unpickled."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import (
    DuplicateNameError,
    FileError,
    MismatchError,
    OptionError,
    TiedWeightsError,
    UnknownAdapterError,
    WrongBaseError,
)
from peftkit.wrapping.installed import adapted_modules
from tests.support.laws import bits
from tests.support.zoo import ADAPTERS, train


def model(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({"conv": nn.Conv2d(8, 12, 3), "body": nn.ModuleDict({"proj": nn.Linear(8, 12)})})


def run(net: nn.ModuleDict) -> Tensor:
    x = torch.linspace(-1, 1, 8 * 25).reshape(1, 8, 5, 5)
    return torch.cat([net["conv"](x).flatten(), net["body"]["proj"](x[0, :, 0, 0])])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    net = model()
    pk.wrap(net, "lora", rank=2, name="style")
    train(net)
    return pk.save(net, tmp_path / "style.safetensors", training={"steps": 10})


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **header: Any) -> Path:
    """The file with other tensors, or with fields of its header replaced."""
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    value = json.loads(metadata["peftkit"]) | header
    target = path.with_name("changed.safetensors")
    save_file(load_file(path) if tensors is None else tensors, target, {"peftkit": json.dumps(value)})
    return target


def refused(net: nn.Module, path: Path, error: type[Exception], *said: str, **kwargs: Any) -> None:
    """Loading raises, says all that, and leaves the model as it was."""
    with pytest.raises(error) as caught:
        pk.load(net, path, **kwargs)
    for text in said:
        assert text in str(caught.value)
    assert not adapted_modules(net)
    assert all(p.requires_grad for p in net.parameters())


def test_the_header_says_everything(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        value = json.loads(opened.metadata()["peftkit"])
    assert value["schema"] == 1
    assert value["name"] == "style"
    assert value["training"] == {"steps": 10}
    (group,) = value["groups"]
    assert group["kind"] == "lora"
    assert group["options"]["rank"] == 2
    assert group["options"]["dropout"] == 0.0
    assert group["weights"] == {"conv": [12, 8, [3, 3], 1], "body.proj": [12, 8, [], 1]}
    assert set(value["base"]) == {"conv", "body.proj"}
    assert set(load_file(file)) == {"conv.up", "conv.down", "body.proj.up", "body.proj.down"}


def test_load_reports_names_and_strength(file: Path) -> None:
    net = model()
    report = pk.load(net, file, strength=0.5)
    assert report.complete
    assert report.name == "style"
    assert report.loaded == ("conv", "body.proj")
    half = run(net)
    pk.set_strength(net, 1.0)
    assert not torch.equal(run(net), half)
    pk.load(net, file, name="again")
    with pytest.raises(DuplicateNameError, match="already has an adapter named 'style'"):
        pk.load(net, file)


@pytest.mark.processes
@pytest.mark.parametrize("case", ADAPTERS)
def test_a_fresh_process_needs_only_the_file(case: str, tmp_path: Path) -> None:
    """One process for all cases: the last one checks them."""
    net = nn.Conv2d(8, 12, 3)
    pk.wrap(net, ADAPTERS[case].kind, **ADAPTERS[case].options)
    train(net)
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        save_file({"x": x, "y": net(x)}, tmp_path / "expected")
    base = {k: v.contiguous() for k, v in net.state_dict().items() if "adapters" not in k}
    save_file(base, tmp_path / "base")
    pk.save(net, tmp_path / "adapter.safetensors")
    if case not in ("lora", "dora of loha", "loldu"):
        fresh = nn.Conv2d(8, 12, 3)
        fresh.load_state_dict(base)
        pk.load(fresh, tmp_path / "adapter.safetensors")
        with torch.no_grad():
            assert torch.equal(fresh(x), net(x))
        return
    script = (
        "import torch, sys, peftkit as pk\n"
        "from safetensors.torch import load_file\n"
        "net = torch.nn.Conv2d(8, 12, 3); net.load_state_dict(load_file('base'))\n"
        "pk.load(net, 'adapter.safetensors'); e = load_file('expected')\n"
        "with torch.no_grad(): sys.exit(0 if torch.equal(net(e['x']), e['y']) else 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False, timeout=240).returncode == 0


def test_strict_names_the_key_and_the_nearest_module(file: Path) -> None:
    tensors = load_file(file)
    renamed = {k.replace("body.proj", "body.porj"): v for k, v in tensors.items()}
    refused(
        model(), rewrite(file, renamed), MismatchError, "missing (2)", "body.proj.down", "unexpected (2)", "body.porj"
    )
    header = json.loads(safe_open(file, "pt").metadata()["peftkit"])
    groups = json.loads(json.dumps(header["groups"]).replace("body.proj", "body.porj"))
    base = {k.replace("body.proj", "body.porj"): v for k, v in header["base"].items()}
    path = rewrite(file, renamed, groups=groups, base=base)
    refused(model(), path, MismatchError, "no weight 'body.porj'", "Did you mean 'body.proj'")
    report = pk.load(net := model(), path, strict=False)
    assert report.loaded == ("conv",)
    assert not report.complete
    assert len(report.unexpected) == 2
    assert [*adapted_modules(net)] == ["conv"]


def test_each_kind_of_misfit_is_told_apart(file: Path) -> None:
    tensors = load_file(file)
    missing = {k: v for k, v in tensors.items() if k != "conv.up"}
    refused(model(), rewrite(file, missing), MismatchError, "missing (1)", "conv.up")
    extra = tensors | {"conv.scale": torch.ones(1)}
    refused(model(), rewrite(file, extra), MismatchError, "unexpected (1)", "conv.scale")
    narrow = tensors | {"conv.up": torch.ones(12, 3)}
    refused(model(), rewrite(file, narrow), MismatchError, "mismatched (1)", "(12, 3) in the file, (12, 2) expected")
    broken = tensors | {"conv.up": tensors["conv.up"].clone().fill_(float("nan"))}
    refused(model(), rewrite(file, broken), MismatchError, "non-finite (1)", "conv.up")
    report = pk.load(model(), rewrite(file, broken), strict=False)
    assert (report.loaded, report.non_finite) == (("body.proj",), ("conv.up",))
    other = nn.ModuleDict({"conv": nn.Conv2d(8, 12, 5), "body": nn.ModuleDict({"proj": nn.Linear(8, 12)})})
    refused(other, file, MismatchError, "12×8 kernel 3×3", "12×8 kernel 5×5")
    refused(nn.Linear(3, 3), file, MismatchError, "unexpected (4)")
    refused(nn.Linear(3, 3), file, MismatchError, "nothing in", strict=False)


@pytest.mark.parametrize(
    "header, said",
    [
        ({"schema": 3}, "schema 3"),
        ({"groups": 3}, "damaged"),
        ({"groups": [{"kind": "lora"}]}, "damaged"),
        ({"base": {"conv": "???"}}, "damaged"),
        ({"name": None}, None),
    ],
    ids=str,
)
def test_a_damaged_header(file: Path, header: dict[str, Any], said: str | None) -> None:
    if said is None:  # a name that is not one is refused where names are
        with pytest.raises((FileError, OptionError)):
            pk.load(model(), rewrite(file, **header), name="a b")
        return
    refused(model(), rewrite(file, **header), FileError, said)


def test_options_and_conventions_of_the_header_are_checked(file: Path) -> None:
    header = json.loads(safe_open(file, "pt").metadata()["peftkit"])
    for field, value, said in (
        ("kind", "lorra", "no adapter is called 'lorra'"),
        ("convention", "0", "written under the convention '0'"),
        ("options", {"rank": 2, "shape": 3}, "no option 'shape'"),
    ):
        groups = [header["groups"][0] | {field: value}]
        refused(model(), rewrite(file, groups=groups), FileError, said)


def test_other_files_are_refused_and_never_unpickled(tmp_path: Path, file: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "boom"),)

    for name in ("a.safetensors", "a.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        refused(model(), tmp_path / name, FileError, "are never unpickled")
    torch.save({"x": torch.ones(1)}, tmp_path / "b.safetensors")
    refused(model(), tmp_path / "b.safetensors", FileError, "not a safetensors file")
    (tmp_path / "c.safetensors").write_bytes(file.read_bytes()[:-7])
    refused(model(), tmp_path / "c.safetensors", FileError, "damaged")
    (tmp_path / "d.safetensors").write_bytes(b"")
    refused(model(), tmp_path / "d.safetensors", FileError, "not a safetensors file")
    refused(model(), tmp_path / "none.safetensors", FileError, "there is no file")
    save_file({"x": torch.ones(1)}, tmp_path / "e.safetensors")
    refused(model(), tmp_path / "e.safetensors", FileError, "no adapter's")
    assert not (tmp_path / "boom").exists()


class TestFailedSave:
    """Whatever goes wrong, the folder holds what it held."""

    @pytest.fixture
    def net(self) -> nn.ModuleDict:
        net = model()
        pk.wrap(net, "lora", rank=2)
        train(net)
        return net

    def fails(self, net: nn.Module, folder: Path, said: str, **kwargs: Any) -> None:
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        with pytest.raises((FileError, OptionError), match=said):
            pk.save(net, folder / "a.safetensors", **kwargs)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before

    def test_untrained(self, tmp_path: Path) -> None:
        net = model()
        pk.wrap(net, "lora")
        (tmp_path / "a.safetensors").write_bytes(b"the old one")
        self.fails(net, tmp_path, "every ΔW is zero")
        pk.save(net, tmp_path / "a.safetensors", allow_zero=True)
        assert pk.load(model(), tmp_path / "a.safetensors").complete

    def test_not_finite(self, net: nn.ModuleDict, tmp_path: Path) -> None:
        with torch.no_grad():
            net["conv"].adapters["default"].up[0, 0] = float("nan")
        self.fails(net, tmp_path, r"conv\.up is not finite")

    def test_overflow_of_the_cast(self, net: nn.ModuleDict, tmp_path: Path) -> None:
        with torch.no_grad():
            net["conv"].adapters["default"].up[0, 0] = 1e6
        self.fails(net, tmp_path, "not finite as torch.float16", dtype=torch.float16)
        pk.save(net, tmp_path / "a.safetensors", dtype=torch.bfloat16)

    def test_underflow_of_the_cast(self, net: nn.ModuleDict, tmp_path: Path) -> None:
        with torch.no_grad():
            for parameter in pk.adapter_parameters(net):
                parameter.mul_(1e-9)
        self.fails(net, tmp_path, "every ΔW is zero", dtype=torch.float16)

    def test_arguments(self, net: nn.ModuleDict, tmp_path: Path) -> None:
        self.fails(net, tmp_path, "JSON", training={"x": torch.ones(1)})
        self.fails(net, tmp_path, "torch.float16", dtype=torch.int8)
        with pytest.raises(FileError, match=r"\*\.safetensors"):
            pk.save(net, tmp_path / "a.pt")
        with pytest.raises(UnknownAdapterError):
            pk.save(net, tmp_path / "a.safetensors", "other")

    def test_interrupted(self, net: nn.ModuleDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*args: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            pk.save(net, tmp_path / "a.safetensors")
        assert not list(tmp_path.iterdir())


def test_files_are_byte_reproducible(tmp_path: Path) -> None:
    net = model()
    pk.wrap(net, "loha", rank=2)
    train(net)
    one, two = (pk.save(net, tmp_path / f"{i}.safetensors").read_bytes() for i in range(2))
    assert one == two


def test_16_bit_files_hold_the_function_to_their_precision(tmp_path: Path) -> None:
    for case in ("lora", "lokr", "loldu", "dora", "oft"):
        net = model()
        pk.wrap(net, ADAPTERS[case].kind, **ADAPTERS[case].options)
        train(net)
        pk.save(net, tmp_path / "a.safetensors", dtype=torch.float16, portable=True)
        fresh = model()
        pk.load(fresh, tmp_path / "a.safetensors")
        with pk.disabled(net):
            effect = (run(net) - run(fresh)).norm()
        assert (run(fresh) - run(net)).norm() < 2e-3 * effect


class TestAnotherBase:
    KINDS = ("lora", "dora", "oft", "loldu")

    def saved(self, kind: str, folder: Path, portable: bool = False) -> Path:
        net = model()
        pk.wrap(net, kind, **({"rank": 2} if kind != "oft" else {"block_size": 4}))
        train(net)
        return pk.save(net, folder / "a.safetensors", portable=portable)

    @pytest.mark.parametrize("kind", KINDS)
    def test_is_noticed_and_needs_a_word(self, kind: str, tmp_path: Path) -> None:
        path = self.saved(kind, tmp_path)
        refused(model(seed=1), path, WrongBaseError, "was trained on another base", "2 of 2 weights differ", kind)
        if kind == "loldu":
            refused(model(seed=1), path, WrongBaseError, "portable=True", other_base=True)
        else:
            assert pk.load(model(seed=1), path, other_base=True).complete

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_a_cast_of_the_same_base_is_the_same_base(self, dtype: torch.dtype, tmp_path: Path) -> None:
        for kind in self.KINDS:
            path = self.saved(kind, tmp_path)
            net = model().to(dtype)
            report = pk.load(net, path)
            assert report.base_distance < 0.003
            twin = model()
            pk.load(twin, path)
            with pk.disabled(twin):
                effect = run(twin)
            effect = (run(twin) - effect).norm()
            pk.merge(net)
            assert (run(net.float()) - run(twin)).norm() < 0.03 * effect

    def test_lora_adds_the_same_change_and_portable_loldu_too(self, tmp_path: Path) -> None:
        for kind in ("lora", "loldu"):
            path = self.saved(kind, tmp_path, portable=True)
            deltas = []
            for seed in (0, 1):
                net = model(seed)
                pk.load(net, path, other_base=True)
                before = net["conv"].weight.detach().clone()
                pk.merge(net)
                deltas.append(net["conv"].weight - before)
            torch.testing.assert_close(deltas[0], deltas[1], rtol=1e-4, atol=1e-6)

    def test_oft_rotates_and_dora_keeps_relative_magnitudes(self, tmp_path: Path) -> None:
        path = self.saved("oft", tmp_path)
        net = model(seed=1)
        norm = net["body"]["proj"].weight.norm(dim=0)
        pk.load(net, path, other_base=True)
        pk.merge(net)
        torch.testing.assert_close(net["body"]["proj"].weight.norm(dim=0), norm)
        path = self.saved("dora", tmp_path)
        norms = []
        for scale in (1.0, 1.5):  # a base and the same one, half again as large
            net = model()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(scale)
            pk.load(net, path, other_base=True)
            pk.merge(net)
            norms.append(net["body"]["proj"].weight.norm(dim=1) / scale)
        torch.testing.assert_close(*norms)


def test_views_shared_storage_and_channels_last_reload_equal(tmp_path: Path) -> None:
    net = model().to(memory_format=torch.channels_last)
    pk.wrap(net, "lora", rank=2)
    train(net)
    one, two = net["conv"].adapters["default"], net["body"]["proj"].adapters["default"]
    pool = torch.randn(12, 5)
    one.up.data, two.up.data = pool[:, :2], pool[:, 1:3]  # overlapping views of one storage
    expected = run(net)
    path = pk.save(net, tmp_path / "a.safetensors")
    fresh = model()
    pk.load(fresh, path)
    torch.testing.assert_close(run(fresh), expected, rtol=1e-6, atol=1e-6)
    assert bits(fresh["conv"].adapters["default"].up) == bits(one.up)
    assert bits(fresh["body"]["proj"].adapters["default"].up) == bits(two.up)


def test_saving_while_merged_writes_the_same_file(tmp_path: Path) -> None:
    net = model()
    pk.wrap(net, "dora", rank=2)
    train(net)
    before = pk.save(net, tmp_path / "a.safetensors").read_bytes()
    pk.merge(net, backup="packed")
    assert pk.save(net, tmp_path / "b.safetensors").read_bytes() == before


def test_a_tied_weight_needs_the_policy_at_load_too(file: Path, tmp_path: Path) -> None:
    net = model()
    net["twin"] = nn.Linear(8, 12)
    net["twin"].weight = net["body"]["proj"].weight
    refused(net, file, TiedWeightsError, "tied='untie'")
    pk.load(net, file, tied="untie")
    assert net["twin"].weight is not net["body"]["proj"].weight
    pk.unwrap(net)
    assert net["twin"].weight is net["body"]["proj"].weight


def test_the_model_itself_may_be_the_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, twin = nn.Linear(4, 6), nn.Linear(4, 6)
    twin.load_state_dict(layer.state_dict())
    pk.wrap(layer, "lora", rank=2)
    train(layer)
    pk.load(twin, pk.save(layer, tmp_path / "a.safetensors"))
    x = torch.randn(3, 4)
    assert torch.equal(twin(x), layer(x))
