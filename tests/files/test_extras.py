"""What trained beside the adapters is in the file, comes back with it, and goes with it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import (
    FileError,
    LeftOutWarning,
    LossyError,
    MergeStateError,
    MismatchError,
    UnsupportedLayerError,
    WrongBaseError,
)


class Classifier(nn.Module):
    """A small network of text with one of each: embedding, norm, biases, attention, head."""

    def __init__(self, words: int = 10) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 8)
        self.block = nn.ModuleDict({"norm": nn.LayerNorm(8), "proj": nn.Linear(8, 8)})
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.block["proj"](self.block["norm"](self.embed(ids)))
        return self.head(self.attention(x, x, x, need_weights=False)[0])


IDS = torch.arange(10).reshape(2, 5)

#: what trains beside the adapters -> the names in the file
TRAINED: dict[str, tuple[Callable[[Classifier], list[nn.Parameter]], tuple[str, ...]]] = {
    "head": (lambda m: list(m.head.parameters()), ("head.weight", "head.bias")),
    "norm": (lambda m: list(m.block["norm"].parameters()), ("block.norm.weight", "block.norm.bias")),
    "bias of an adapted layer": (lambda m: [m.block["proj"].bias], ("block.proj.bias",)),
    "embedding": (lambda m: [m.embed.weight], ("embed.weight",)),
    "biases of an attention": (
        lambda m: [m.attention.in_proj_bias, m.attention.out_proj.bias],
        ("attention.in_proj_bias", "attention.out_proj.bias"),
    ),
    "weight of an adapted layer": (lambda m: [m.block["proj"].weight], ("block.proj.weight",)),
    "weight of an adapted attention": (lambda m: [m.attention.in_proj_weight], ("attention.in_proj_weight",)),
}


def network(words: int = 10) -> Classifier:
    torch.manual_seed(0)
    return Classifier(words).eval()


def trained(case: str, kind: str = "lora", words: int = 10) -> Classifier:
    """A wrapped network whose adapters and extras have been moved."""
    net = network(words)
    pk.wrap(net, kind, targets=["block.proj", "attention.q_proj"], rank=2, name="style")
    for parameter in _weights(net, case):
        parameter.requires_grad_(True)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return net


def _weights(net: Classifier, case: str) -> list[nn.Parameter]:
    """The parameters of a case; weights of an adapted attention are read past its adapters."""
    if case == "weight of an adapted attention":
        return [p for name, p in net.named_parameters() if name == "attention.in_proj_weight"]
    return TRAINED[case][0](net)


@pytest.fixture
def head_file(tmp_path: Path) -> Path:
    return pk.save(trained("head"), tmp_path / "style.safetensors")


def header(path: Path) -> dict[str, object]:
    with safe_open(path, "pt") as opened:
        return json.loads(opened.metadata()["peftkit"])


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **fields: object) -> Path:
    target = path.with_name("changed.safetensors")
    value = header(path) | fields
    save_file(load_file(path) if tensors is None else tensors, target, {"peftkit": json.dumps(value)})
    return target


@pytest.mark.parametrize("kind", ["lora", "loldu", "dora"])
@pytest.mark.parametrize("case", TRAINED)
def test_a_file_brings_what_trained_and_takes_it_away(case: str, kind: str, tmp_path: Path) -> None:
    net = trained(case, kind)
    if kind == "loldu" and case.startswith("weight"):
        with pytest.raises(FileError, match="pass portable=True"):
            pk.save(net, tmp_path / "style.safetensors")
    path = pk.save(net, tmp_path / "style.safetensors", portable=kind == "loldu" and case.startswith("weight"))
    assert set(pk.read(path).extras) == set(TRAINED[case][1])

    fresh = network()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    flags = [p.requires_grad for p in fresh.parameters()]
    objects = {name: id(p) for name, p in fresh.named_parameters()}
    report = pk.load(fresh, path)
    assert report.complete
    assert set(report.extras) == set(TRAINED[case][1])
    with torch.no_grad():
        assert torch.equal(fresh(IDS), net(IDS))
    for own in _weights(fresh, case):
        assert own.requires_grad
        assert id(own) in objects.values()

    pk.unwrap(fresh)
    assert fresh.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    assert [p.requires_grad for p in fresh.parameters()] == flags


def test_extras_train_on_and_are_saved_again(head_file: Path, tmp_path: Path) -> None:
    net = network()
    pk.load(net, head_file)
    net(IDS).square().sum().backward()
    assert net.head.weight.grad is not None
    with torch.no_grad():
        net.head.weight.add_(1.0)
    again = pk.save(net, tmp_path / "again.safetensors")
    assert torch.equal(pk.read(again).extras["head.weight"], net.head.weight)


def test_a_resized_embedding_fits_the_resized_model_alone(tmp_path: Path) -> None:
    net = trained("embedding", words=12)
    path = pk.save(net, tmp_path / "words.safetensors")
    larger = network(12)
    pk.load(larger, path)
    with torch.no_grad():
        assert torch.equal(larger(IDS + 2), net(IDS + 2))
    smaller = network(10)
    with pytest.raises(MismatchError, match=r"embed\.weight: \(12, 8\) in the file, \(10, 8\) in the model"):
        pk.load(smaller, path)
    assert all(p.requires_grad for p in smaller.parameters())


def test_a_shared_parameter_is_saved_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.embed, self.out = nn.Linear(4, 4), nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.body(self.embed(ids)))

    net = Tied()
    pk.wrap(net, "lora", targets="body", rank=2)
    net.embed.weight.requires_grad_(True)
    nn.init.normal_(net.embed.weight)
    for parameter in pk.adapter_parameters(net):
        nn.init.normal_(parameter)
    path = pk.save(net, tmp_path / "tied.safetensors")
    assert set(pk.read(path).extras) == {"embed.weight"}
    renamed = rewrite(path, {("out.weight" if k == "embed.weight" else k): v for k, v in load_file(path).items()})
    renamed = rewrite(renamed, load_file(renamed), extras=["out.weight"])
    fresh = Tied()
    fresh.body.load_state_dict({k: v for k, v in net.body.state_dict().items() if "adapters" not in k})
    pk.load(fresh, renamed)
    assert fresh.out.weight is fresh.embed.weight
    assert torch.equal(fresh.embed.weight, net.embed.weight)


def test_left_out_on_request_and_said(tmp_path: Path, head_file: Path) -> None:
    with pytest.warns(LeftOutWarning, match=r"2 parameters \(head\.weight, head\.bias\) left out"):
        path = pk.save(trained("head"), tmp_path / "without.safetensors", extras=False)
    assert "extras" not in header(path)
    assert not pk.read(path).extras
    net = network()
    report = pk.load(net, head_file, extras=False)
    assert report.complete
    assert report.left_out == ("head.weight", "head.bias")
    assert "left out, as extras=False asks" in str(report)
    assert torch.equal(net.head.weight, network().head.weight)
    assert not net.head.weight.requires_grad


def test_a_file_without_extras_has_the_header_it_had(tmp_path: Path) -> None:
    net = network()
    pk.wrap(net, "lora", targets="block.proj", rank=2)
    path = pk.save(net, tmp_path / "plain.safetensors", allow_zero=True)
    assert "extras" not in header(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["head.weight"].flatten(), r"head\.weight: \(24,\) in the file, \(3, 8\) in the model"),
        (lambda t: t["head.weight"].to(torch.int32), r"head\.weight: \(3, 8\) torch\.int32 in the file"),
        (lambda t: t["head.weight"] / 0, r"non-finite \(1\):\n  head\.weight"),
    ],
)
def test_an_extra_that_does_not_fit_changes_nothing(
    head_file: Path, change: Callable[[dict[str, Tensor]], Tensor], said: str
) -> None:
    tensors = load_file(head_file)
    bad = rewrite(head_file, tensors | {"head.weight": change(tensors)})
    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(MismatchError, match=said):
        pk.load(net, bad)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert not hasattr(net.block["proj"], "adapter_state")
    report = pk.load(net, bad, strict=False)
    assert report.extras == ("head.bias",)
    assert torch.equal(net.head.bias, tensors["head.bias"])
    assert torch.equal(net.head.weight, before["head.weight"])


def test_an_extra_without_a_parameter_is_unexpected(head_file: Path) -> None:
    class Headless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            net = network()
            self.embed, self.block, self.attention, self.classifier = net.embed, net.block, net.attention, net.head

    with pytest.raises(MismatchError, match=r"head\.weight: the model has no parameter 'head\.weight'"):
        pk.load(Headless(), head_file)


@pytest.mark.parametrize("extras", [["head.weight", "head.bias", "lost"], ["head.weight", "head.weight"], [1], "head"])
def test_a_damaged_list_is_refused(head_file: Path, extras: object) -> None:
    with pytest.raises(FileError, match=r"damaged|a list was expected"):
        pk.read(rewrite(head_file, extras=extras))


def test_a_header_that_does_not_list_them_leaves_them_to_nobody(head_file: Path) -> None:
    value = header(head_file)
    del value["extras"]
    target = head_file.with_name("unlisted.safetensors")
    save_file(load_file(head_file), target, {"peftkit": json.dumps(value)})
    with pytest.raises(MismatchError, match=r"head\.bias: no adapter in the header has it"):
        pk.load(network(), target)


def test_not_finite_is_not_saved(tmp_path: Path) -> None:
    net = trained("head")
    with torch.no_grad():
        net.head.weight[0, 0] = float("nan")
    with pytest.raises(FileError, match=r"head\.weight is not finite"):
        pk.save(net, tmp_path / "bad.safetensors")
    assert not list(tmp_path.iterdir())


def test_dtype_of_extras(tmp_path: Path) -> None:
    net = trained("head")
    extras = pk.read(pk.save(net, tmp_path / "own.safetensors")).extras
    assert extras["head.weight"].dtype == torch.float32
    narrow = pk.read(pk.save(net, tmp_path / "narrow.safetensors", dtype=torch.bfloat16)).extras
    assert narrow["head.weight"].dtype == torch.bfloat16
    assert narrow["head.bias"].dtype == torch.float32  # as with adapters: vectors keep theirs


def test_two_files_over_one_head_in_any_order_of_leaving(tmp_path: Path) -> None:
    one, two = trained("head"), trained("head")
    with torch.no_grad():
        two.head.weight.mul_(-3)
    first = pk.save(one, tmp_path / "one.safetensors")
    second = pk.save(two, tmp_path / "two.safetensors")
    for leaving in (("a", "b"), ("b", "a")):
        net = network()
        before = net.head.weight.detach().clone()
        pk.load(net, first, name="a")
        pk.load(net, second, name="b")
        assert torch.equal(net.head.weight, two.head.weight)
        pk.unwrap(net, leaving[0])
        assert torch.equal(net.head.weight, (two if leaving[0] == "a" else one).head.weight)
        pk.unwrap(net, leaving[1])
        assert torch.equal(net.head.weight, before)


def test_merged_states_are_refused_or_baked_in(head_file: Path, tmp_path: Path) -> None:
    net = network()
    pk.load(net, head_file)
    expected = net(IDS)
    pk.merge(net)
    pk.unwrap(net, keep_merged=True)
    torch.testing.assert_close(net(IDS), expected)
    assert all(p.requires_grad for p in net.parameters())

    other = trained("weight of an adapted layer")
    pk.merge(other)
    with pytest.raises(MergeStateError, match=r"block\.proj\.weight trains beside the adapters, and style is merged"):
        pk.save(other, tmp_path / "merged.safetensors")
    path = pk.save(trained("weight of an adapted layer"), tmp_path / "weight.safetensors")
    busy = network()
    pk.wrap(busy, "lora", targets="block.proj", rank=2, name="own")
    nn.init.ones_(pk.adapter_parameters(busy)[0])
    nn.init.ones_(pk.adapter_parameters(busy)[1])
    pk.merge(busy)
    with pytest.raises(MergeStateError, match="merged"):
        pk.load(busy, path)


def test_a_weight_under_its_adapter_is_not_left_out_unasked(tmp_path: Path) -> None:
    path = pk.save(trained("weight of an adapted layer"), tmp_path / "weight.safetensors")
    assert set(header(path)["base"]) == {"attention.q_proj"}  # type: ignore[call-overload]
    with pytest.raises(WrongBaseError, match=r"extras=False leaves out 1 parameter \(block\.proj\.weight\)"):
        pk.load(network(), path, extras=False)
    pk.load(network(), path, extras=False, other_base=True)


def test_a_parameter_of_another_shape_cannot_be_given_back(head_file: Path) -> None:
    net = network()
    pk.load(net, head_file)
    net.head.weight = nn.Parameter(torch.zeros(4, 8))
    with pytest.raises(UnsupportedLayerError, match=r"head\.weight is \(4, 8\), and was \(3, 8\) before 'style'"):
        pk.unwrap(net)


def test_copies_know_what_was_before(head_file: Path) -> None:
    net = network()
    pk.load(net, head_file)
    twin = copy.deepcopy(net)
    pk.unwrap(twin)
    assert torch.equal(twin.head.weight, network().head.weight)
    assert not torch.equal(net.head.weight, twin.head.weight)
    pk.unwrap(net)
    assert torch.equal(net.head.weight, twin.head.weight)


# -- files ----------------------------------------------------------------------------------------------------------


def test_inspect_doctor_and_diff_know_them(head_file: Path, tmp_path: Path) -> None:
    found = pk.inspect(head_file)
    assert found.extras == ("head.weight", "head.bias")
    assert "2 parameters (head.weight, head.bias) that trained beside" in str(found)
    assert pk.doctor(head_file).code == 0
    tensors = load_file(head_file)
    assert pk.doctor(rewrite(head_file, tensors | {"head.bias": tensors["head.bias"] / 0})).code == 2
    other = rewrite(head_file, tensors | {"head.weight": tensors["head.weight"] * 1.5})
    apart = pk.diff(head_file, other)
    assert not apart.equal
    assert apart.distances["head.weight"] == pytest.approx(0.5)
    assert apart.distances["head.bias"] == 0
    same = head_file.with_name("same.safetensors")
    same.write_bytes(head_file.read_bytes())
    assert pk.diff(head_file, same).equal


@pytest.mark.parametrize("strength", [1.0, 0.25, -1.0])
def test_merging_into_a_checkpoint(strength: float, tmp_path: Path) -> None:
    net = trained("head")
    path = pk.save(net, tmp_path / "style.safetensors")
    base = network()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    plan = pk.plan_merge(tmp_path / "base.safetensors", {path: strength})
    assert {"head.weight", "head.bias"} <= set(plan.touched)
    assert "and 2 parameters (head.weight, head.bias)" in str(plan)
    report = pk.merge_checkpoint(
        tmp_path / "base.safetensors", {path: strength}, tmp_path / "out.safetensors", verify=True
    )
    assert "head.weight" in report.changed
    merged = network()
    merged.load_state_dict(load_file(tmp_path / "out.safetensors"))
    W, E = base.head.weight, net.head.weight
    if strength == 1:
        assert torch.equal(merged.head.weight, E)
        torch.testing.assert_close(merged(IDS), net(IDS))
    torch.testing.assert_close(merged.head.weight, W + strength * (E - W))


def test_merging_in_another_dtype_and_shape(tmp_path: Path) -> None:
    net = trained("head")
    path = pk.save(net, tmp_path / "style.safetensors")
    narrow = {key: value.bfloat16() for key, value in network().state_dict().items()}
    save_file(narrow, tmp_path / "base.safetensors")
    pk.merge_checkpoint(tmp_path / "base.safetensors", {path: 1.0}, tmp_path / "out.safetensors", other_base=True)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["head.weight"], net.head.weight.bfloat16())
    save_file(network().state_dict() | {"head.bias": torch.zeros(4)}, tmp_path / "large.safetensors")
    with pytest.raises(MismatchError, match=r"head\.bias: \(3,\) in the file, \(4,\) in the base"):
        pk.merge_checkpoint(tmp_path / "large.safetensors", {path: 1.0}, tmp_path / "out2.safetensors", other_base=True)
    gone = {key: value for key, value in network().state_dict().items() if key != "head.bias"}
    save_file(gone, tmp_path / "gone.safetensors")
    with pytest.raises(MismatchError, match=r"head\.bias: the base has no such tensor"):
        pk.merge_checkpoint(tmp_path / "gone.safetensors", {path: 1.0}, tmp_path / "out3.safetensors")


def test_a_tensor_that_is_replaced_takes_no_change_beside(tmp_path: Path) -> None:
    path = pk.save(trained("weight of an adapted layer"), tmp_path / "weight.safetensors")
    save_file(network().state_dict(), tmp_path / "base.safetensors")
    with pytest.raises(MismatchError, match=r"block\.proj\.weight replaces .* changes too"):
        pk.merge_checkpoint(tmp_path / "base.safetensors", {path: 1.0}, tmp_path / "out.safetensors")


def test_files_from_files_keep_them_or_refuse(head_file: Path, tmp_path: Path) -> None:
    kept = {
        "convert": pk.convert(head_file, tmp_path / "converted.safetensors", "full").path,
        "resize": pk.resize(head_file, tmp_path / "resized.safetensors", rank=1).path,
        "rescale": pk.rescale(head_file, 0.5, tmp_path / "rescaled.safetensors").path,
    }
    tensors = load_file(head_file)
    for verb, path in kept.items():
        extras = pk.read(path).extras
        assert {name: torch.equal(value, tensors[name]) for name, value in extras.items()} == {
            "head.weight": True,
            "head.bias": True,
        }, verb
    with pytest.raises(LossyError, match=r"head\.weight, head\.bias\) that trained beside"):
        pk.combine({head_file: 1.0, kept["rescale"]: 1.0}, tmp_path / "sum.safetensors")
    assert not (tmp_path / "sum.safetensors").exists()


def test_an_export_leaves_them_out_on_request_and_says_so(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    pk.wrap(net, "full", targets="0")
    nn.init.ones_(pk.adapter_parameters(net)[0])
    net[1].requires_grad_(True)
    report = pk.export(net, tmp_path / "out.safetensors", "lycoris", extras=False)
    assert report.left_out == ("1.weight", "1.bias")
    assert "2 parameters (1.weight, 1.bias) left out" in str(report)
    assert not pk.read(report.path).extras


def test_an_export_never_loses_them_in_silence(head_file: Path, tmp_path: Path) -> None:
    for source in (trained("head"), head_file):
        out = tmp_path / "out.safetensors"
        with pytest.raises(LossyError, match=r"2 parameters \(head\.weight, head\.bias\).*extras=False"):
            pk.export(source, out, "lycoris")
        assert not out.exists()


def test_wrappers_of_torch_are_not_in_the_names(tmp_path: Path) -> None:
    net = trained("head")
    path = pk.save(torch.compile(net, backend="eager"), tmp_path / "compiled.safetensors")  # type: ignore[arg-type]
    assert set(pk.read(path).extras) == {"head.weight", "head.bias"}
    fresh = network()
    wrapped = nn.DataParallel(fresh)
    assert pk.load(wrapped, path).complete
    assert torch.equal(fresh.head.weight, net.head.weight)
    pk.unwrap(wrapped)
    assert torch.equal(fresh.head.weight, network().head.weight)
