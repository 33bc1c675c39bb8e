"""Combining adapter files: the sum of their ΔW, exactly or truncated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import ExportError, MismatchError, OptionError
from peftkit.files.formats import native
from tests.support.adapter_files import (
    KOHYA,
    LYCORIS,
    base_of,
    deltas_of,
    lycoris_file,
    lycoris_hands,
    optimum,
    require_deltas,
    slices,
    source,
    true_deltas,
)
from tests.support.files import State, listing, load, metadata, write
from tests.support.hands import exact, lora
from tests.support.models import net
from tests.support.zoo import train

# -- combine -----------------------------------------------------------------------------------------------------------


def three(tmp_path: Path) -> tuple[dict[str, Path], dict[str, State]]:
    """A native file, one of LyCORIS and a folder of PEFT, on the same three weights; and their ΔW."""
    names = LYCORIS
    model = net()
    pk.wrap(model, "loha", rank=2, targets=list(names))
    train(model)
    files = {"native": pk.save(model, tmp_path / "native.safetensors")}
    hands = lycoris_hands("lokr")
    files["lycoris"] = lycoris_file(tmp_path / "lycoris.safetensors", hands)
    folder = tmp_path / "peft"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": list(names), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors: State = {}
    products: State = {}
    for i, name in enumerate(names):
        up, down = exact(12 if name == "lin" else 8, 2, seed=50 + i), exact(2, 8, seed=60 + i)
        tensors |= {f"base_model.model.{name}.lora_B.weight": up, f"base_model.model.{name}.lora_A.weight": down}
        products[name] = 1.5 * up.double() @ down.double()
    write(folder / "adapter_model.safetensors", tensors)
    files["peft"] = folder
    deltas = {"native": slices(deltas_of(files["native"])), "lycoris": true_deltas(hands), "peft": products}
    return files, deltas


def weighted(deltas: Mapping[str, State], weights: Mapping[str, float]) -> State:
    first = next(iter(deltas.values()))
    return {name: sum((w * deltas[k][name] for k, w in weights.items()), torch.zeros(())) for name in first}


def deltas_on_net(path: Path) -> State:
    return slices(deltas_of(path))


WEIGHTS = {"native": 0.5, "lycoris": -0.25, "peft": 2.0}


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
@pytest.mark.parametrize("first", WEIGHTS)
def test_files_of_different_formats_are_summed_in_the_format_of_the_first(
    first: str, method: str, tmp_path: Path
) -> None:
    files, deltas = three(tmp_path)
    order = sorted(WEIGHTS, key=lambda name: name != first)
    out = tmp_path / ("out" if first == "peft" else "out.safetensors")
    options: dict[str, Any] = {"rank": 3} if method == "svd" or first == "peft" else {}
    if first == "peft" and method == "cat":
        options = {}
    report = pk.combine({files[name]: WEIGHTS[name] for name in order}, out, method=method, **options)
    expected, found = weighted(deltas, WEIGHTS), deltas_on_net(out)
    assert found.keys() == expected.keys()
    for name, X_ in expected.items():
        error = float((found[name] - X_).norm() / X_.norm())
        best = optimum(X_, options["rank"]) if options else 0.0
        assert error == pytest.approx(best, rel=1e-4, abs=2e-6), name
    spelled = {name: f"lycoris_{name.replace('.', '_')}" if first == "lycoris" else name for name in LYCORIS}
    assert {m.name for m in report.modules} == set(spelled.values())
    for m in report.modules:
        name = next(n for n, s in spelled.items() if s == m.name)
        true = float((found[name] - expected[name]).norm() / expected[name].norm())
        assert m.error == pytest.approx(true, rel=1e-3, abs=2e-6)
    prefix = {"native": "", "lycoris": "lycoris_", "peft": "base_model.model."}[first]
    keys = load(out / "adapter_model.safetensors" if out.is_dir() else out)
    assert all(key.startswith(prefix) for key in keys)
    assert (native.KEY in metadata(out)) == (first == "native") if out.is_file() else True


def test_cat_has_the_ranks_of_all_files(tmp_path: Path) -> None:
    one, two = (
        lycoris_file(tmp_path / f"{s}.safetensors", {"lin": lora(12, 8, r, seed=s)}) for s, r in ((1, 2), (7, 3))
    )
    report = pk.combine({one: 1.0, two: -0.5}, tmp_path / "out.safetensors", method="cat")
    assert report.modules[0].after == "lora 5"
    assert load(tmp_path / "out.safetensors")["lycoris_lin.lora_down.weight"].shape == (5, 8)


@pytest.mark.parametrize("first", ["native", "lycoris", "peft"])
def test_modules_that_only_a_later_file_has_are_named_as_the_first_names_its_own(first: str, tmp_path: Path) -> None:
    """Else the program that reads the first would not find them in the result."""
    files, deltas = three(tmp_path)
    hand = lora(12, 8, seed=33)
    others = {
        "lycoris": lycoris_file(tmp_path / "more.safetensors", {"k1": hand}),
        "native": tmp_path / "more native.safetensors",
    }
    model = net()
    pk.load(model, others["lycoris"])
    pk.save(model, others["native"])
    other = others["native" if first == "lycoris" else "lycoris"]
    out = tmp_path / ("out" if first == "peft" else "out.safetensors")
    try:
        pk.combine({files[first]: 1.0, other: 1.0}, out, method="cat")
    except (ExportError, MismatchError, OptionError):  # a name with underscores does not say where its dots were
        assert not out.exists() and first != "lycoris"
        return
    keys = load(out / "adapter_model.safetensors" if out.is_dir() else out)
    prefix = {"native": "", "lycoris": "lycoris_", "peft": "base_model.model."}[first]
    assert {key for key in keys if "k1" in key}
    assert all(key.startswith(f"{prefix}k1.") for key in keys if "k1" in key)
    found = deltas_on_net(out)
    require_deltas(found, {**deltas[first], "k1": hand.delta(torch.zeros(0)).reshape(12, 8, 1, 1)}, 1e-5)


def ties(deltas: list[Tensor], density: float) -> Tensor:
    """Trim, elect, average: https://arxiv.org/abs/2306.01708, §3, entry by entry."""
    trimmed = []
    for delta in deltas:
        count = round(density * delta.numel())
        order = sorted(range(delta.numel()), key=lambda i: -abs(float(delta.flatten()[i])))
        kept = torch.zeros(delta.numel(), dtype=torch.float64)
        for i in order[:count]:
            kept[i] = delta.flatten()[i]
        trimmed.append(kept)
    merged = torch.zeros(deltas[0].numel(), dtype=torch.float64)
    for i in range(len(merged)):
        values = [float(t[i]) for t in trimmed]
        positive, negative = sum(v for v in values if v > 0), sum(v for v in values if v < 0)
        elected = [v for v in values if (v > 0 if positive > -negative else v < 0)]
        if elected and positive != -negative:
            merged[i] = sum(elected) / len(elected)
    return merged.reshape(deltas[0].shape)


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_ties_is_trim_elect_and_average(density: float, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    changes = [torch.randn(12, 8, generator=generator) for _ in range(3)]
    files = [write(tmp_path / f"{i}.safetensors", {"lycoris_lin.diff": t}) for i, t in enumerate(changes)]
    weights = (1.0, 0.5, -0.75)
    pk.combine(dict(zip(files, weights, strict=True)), tmp_path / "out.safetensors", method="ties", density=density)
    found = load(tmp_path / "out.safetensors")["lycoris_lin.diff"]
    expected = ties([w * t.double() for w, t in zip(weights, changes, strict=True)], density)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


def test_dare_drops_at_random_and_keeps_the_mean(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    changes = [torch.randn(40, 50, generator=generator) + 3, torch.randn(40, 50, generator=generator) - 5]
    files = [write(tmp_path / f"{i}.safetensors", {"lycoris_lin.diff": t}) for i, t in enumerate(changes)]
    weights, density = (1.0, 0.5), 0.25
    out = tmp_path / "out.safetensors"
    a, b = (w * t.double() / density for w, t in zip(weights, changes, strict=True))
    total, draws = torch.zeros(40, 50, dtype=torch.float64), 60
    for seed in range(draws):
        pk.combine(dict(zip(files, weights, strict=True)), out, method="dare", density=density, seed=seed)
        found = load(out)["lycoris_lin.diff"].double()
        outcomes = torch.stack([torch.zeros_like(a), a, b, a + b])
        gaps = (outcomes - found).abs()
        assert (gaps.min(0).values < 1e-5).all(), "an entry that is neither dropped nor scaled up"
        shares = torch.bincount(gaps.argmin(0).flatten(), minlength=4) / found.numel()
        p = torch.tensor([(1 - density) ** 2, density * (1 - density), density * (1 - density), density**2])
        assert ((shares - p).abs() < 5 * (p * (1 - p) / found.numel()).sqrt()).all(), "files are not dropped alone"
        total += found / draws
    truth = density * (a + b)
    spread = ((1 / density - 1) / draws) ** 0.5 * ((density * a) ** 2 + (density * b) ** 2).sqrt()
    z = (total - truth) / spread
    assert float(z.abs().max()) < 6 and abs(float(z.mean())) < 0.15 and float(z.std()) == pytest.approx(1, abs=0.1)
    again = out.read_bytes()
    pk.combine(dict(zip(files, weights, strict=True)), out, method="dare", density=density, seed=draws - 1)
    assert out.read_bytes() == again
    pk.combine(dict(zip(files, weights, strict=True)), out, method="dare", density=1.0)
    torch.testing.assert_close(load(out)["lycoris_lin.diff"].double(), truth, rtol=1e-5, atol=1e-6)


def test_files_for_other_shapes_are_not_combined(tmp_path: Path) -> None:
    one = lycoris_file(tmp_path / "1.safetensors", {"lin": lora(12, 8)})
    two = lycoris_file(tmp_path / "2.safetensors", {"lin": lora(12, 9)})
    before = listing(tmp_path)
    with pytest.raises(MismatchError, match="lin"):
        pk.combine({one: 1.0, two: 1.0}, tmp_path / "out.safetensors")
    assert listing(tmp_path) == before


def test_adapters_that_read_their_base_are_combined_on_it(tmp_path: Path) -> None:
    one, two = source(tmp_path, "dora", name="1.safetensors"), source(tmp_path, "oft", name="2.safetensors")
    with pytest.raises(ExportError, match="base"):
        pk.combine({one: 1.0, two: 1.0}, tmp_path / "out.safetensors")
    pk.combine({one: 0.5, two: -1.0}, tmp_path / "out.safetensors", base=base_of(tmp_path))
    a, b, found = deltas_on_net(one), deltas_on_net(two), deltas_on_net(tmp_path / "out.safetensors")
    for name in a.keys() | b.keys():
        expected = 0.5 * a.get(name, torch.zeros(())) - b.get(name, torch.zeros(()))
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)


# -- what a review found -----------------------------------------------------------------------------------------------


def test_a_sum_of_loras_is_a_lora(tmp_path: Path) -> None:
    """Its matrix would be smaller, but sd-scripts, diffusers and PEFT read no other kind."""
    name = KOHYA[next(iter(KOHYA))]
    tensors = {f"{name}.lora_up.weight": exact(12, 7, seed=1), f"{name}.lora_down.weight": exact(7, 8, seed=2)}
    files = [write(tmp_path / f"{i}.safetensors", tensors) for i in range(2)]
    pk.combine({files[0]: 0.25, files[1]: 0.5}, tmp_path / "out.safetensors")
    found = load(tmp_path / "out.safetensors")
    up, down, alpha = (found[f"{name}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha"))
    expected = 0.75 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    assert len(down) == 8
    assert torch.allclose(up @ down * (alpha / len(down)), expected, rtol=1e-5)


def test_a_sum_in_a_folder_of_peft_is_of_one_kind(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(64, 64), nn.Linear(8, 8)

    for name in ("one", "two"):
        model = Two()
        pk.wrap(model, "lora", rank=5)
        train(model)
        pk.export(model, tmp_path / name, "peft")
    out = tmp_path / "out"
    report = pk.combine({tmp_path / "one": 0.5, tmp_path / "two": 0.5}, out)
    assert {m.after for m in report.modules} == {"lora 10", "lora 8"}
    assert pk.inspect(out).loads["peft"] == ""


def test_what_is_ignored_is_in_one_of_the_files(tmp_path: Path) -> None:
    factors = {"a.lora_up.weight": torch.ones(4, 1), "a.lora_down.weight": torch.ones(1, 4)}
    one = write(tmp_path / "one.safetensors", {**factors, "extra": torch.ones(1)})
    two, out = write(tmp_path / "two.safetensors", factors), tmp_path / "out.safetensors"
    base = write(tmp_path / "base.safetensors", {"a.weight": torch.zeros(4, 4)})
    assert pk.diff(one, two, ignore="extra").equal
    pk.combine({two: 1.0, one: 1.0}, out, ignore="extra")
    pk.merge_checkpoint(base, {two: 1.0, one: 1.0}, out, ignore="extra")
    assert torch.equal(load(out)["a.weight"], torch.full((4, 4), 2.0))
    with pytest.raises(OptionError, match="'more' matches no tensor"):
        pk.diff(one, two, ignore=["extra", "more"])
