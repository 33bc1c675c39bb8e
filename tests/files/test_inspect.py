"""Inspecting and comparing adapter files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import peftkit as pk
from peftkit.errors import ExportError
from tests.support.adapter_files import (
    ADDITIVE,
    ENTRIES,
    KOHYA,
    LYCORIS,
    READS_BASE,
    SD15,
    kohya_file,
    kohya_hands,
    lycoris_file,
    lycoris_hands,
    sd15_model,
    source,
    truth,
)
from tests.support.cells import TARGETS
from tests.support.files import State, load, metadata, write
from tests.support.hands import exact, lora
from tests.support.models import net, state
from tests.support.zoo import ADAPTERS, train

# -- inspect -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ADAPTERS)
def test_inspect_says_the_norm_the_kind_and_the_rank_of_every_module(case: str, tmp_path: Path) -> None:
    path = source(tmp_path, case)
    found = pk.inspect(path)
    assert found.format == "native" and found.path == path and not found.problems
    norms = {name: float(delta.norm()) for name, delta in truth(case).items()}
    assert {m.name for m in found.modules} == set(norms)
    kind = (
        "dora"
        if ADAPTERS[case].options.get("decompose")
        else {"locon": "lora"}.get(ADAPTERS[case].kind, ADAPTERS[case].kind)
    )
    for m in found.modules:
        assert m.kind == kind
        if case in READS_BASE:
            assert m.norm is None
        else:
            assert m.norm == pytest.approx(norms[m.name], rel=1e-5)
        expected = ADAPTERS[case].options.get("rank")
        assert m.rank == expected or expected is None
    tensors = load(path)
    assert sum(m.parameters for m in found.modules) == sum(t.numel() for t in tensors.values())
    assert found.table().row_count == len(norms)


def test_inspect_of_a_foreign_file_says_its_scales_and_its_family(tmp_path: Path) -> None:
    hands = {path: lora(*make().weight.shape[:2], rank=4, alpha=2.0) for path, make in SD15.items()}
    file = kohya_file(tmp_path / "a.safetensors", hands, dict(ENTRIES))
    found = pk.inspect(file)
    assert (found.format, found.family) == ("kohya", "Stable Diffusion 1.5")
    for m in found.modules:
        path = next(p for p, k in KOHYA.items() if k == m.name)
        assert (m.kind, m.rank) == ("lora", 4)
        assert "0.5" in m.scale and "alpha 2" in m.scale and "rank 4" in m.scale
        assert m.norm == pytest.approx(float(hands[path].delta(torch.zeros(0)).norm()), rel=1e-5)
    assert found.metadata == ENTRIES
    assert "loads in: a1111, forge, comfyui, kohya" in str(found)
    assert found.loads["kohya"] == "" and found.loads["peft"] and found.loads["lycoris"]


@pytest.mark.parametrize(
    "case",
    ["lora", "loha", "lokr", "loldu", "dora", "dora in", "full", "ia3", "ia3 in", "glora", "boft", "oft", "oft in"],
)
def test_a_file_exported_for_a_program_loads_there_by_inspect_and_is_the_same_by_diff(
    case: str, tmp_path: Path
) -> None:
    model = sd15_model()
    base = write(tmp_path / "base.safetensors", {f"unet.{k}": t for k, t in state(model).items()})
    pk.wrap(model, ADAPTERS[case].kind, **({"block_size": 10} if case == "boft" else ADAPTERS[case].options))
    train(model, size=0.05)
    own = pk.save(model, tmp_path / "own.safetensors", portable=True)
    written = 0
    for target in TARGETS:
        out = tmp_path / (target if target == "peft" else f"{target}.safetensors")
        try:
            pk.export(model, out, target, family="sd15", component="unet")
        except ExportError:
            continue
        written += 1
        found = pk.inspect(out)
        assert found.loads[target] == "", target
        assert found.family == "Stable Diffusion 1.5", target
        assert not found.problems
        for m in found.modules:
            if m.norm is not None:
                assert m.norm > 0
        assert pk.doctor(out).code == 0, target
        difference = pk.diff(own, out, base=base)
        assert len(difference.distances) == len(SD15) and difference.only == ((), ())
        assert max(difference.distances.values()) < (1e-6 if case in ADDITIVE else 1e-4), target
        if case in ADDITIVE:
            assert difference.equal
    assert written >= 4
    assert all(why for why in pk.inspect(own).loads.values())


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[Callable[[State], State]], Path]:
    """A kohya file of three modules, changed."""
    original = load(kohya_file(tmp_path / "sound.safetensors", kohya_hands()))
    return lambda change: write(tmp_path / "broken.safetensors", change(dict(original)))


FIRST = next(iter(KOHYA.values()))


def test_doctor_says_0_of_a_sound_file(tmp_path: Path) -> None:
    for kind in ("lora", "loha", "lokr", "full"):
        diagnosis = pk.doctor(kohya_file(tmp_path / "a.safetensors", kohya_hands(kind)))
        assert (diagnosis.code, diagnosis.findings) == (0, ())
    for case in ADAPTERS:
        assert pk.doctor(source(tmp_path, case)).code == 0, case
    assert pk.doctor(source(tmp_path, "loldu", portable=False)).code == 0
    vectors = write(tmp_path / "v.safetensors", {"lycoris_norm.w_norm": exact(12), "lycoris_norm.b_norm": exact(12)})
    assert pk.doctor(vectors).code == 0


@pytest.mark.parametrize(
    "change, code, words",
    [
        (lambda t: t | {f"{FIRST}.lora_up.weight": torch.zeros(320, 2)}, 1, "1 of 3 modules do nothing"),
        (lambda t: {k: torch.zeros_like(v) if "up" in k else v for k, v in t.items()}, 2, "3 of 3 modules"),
        (lambda t: t | {f"{FIRST}.lora_up.weight": torch.full((320, 2), math.nan)}, 2, "not finite"),
        (lambda t: t | {f"{FIRST}.lora_down.weight": torch.full((2, 768), math.inf)}, 2, "not finite"),
        (lambda t: {k: v for k, v in t.items() if k != f"{FIRST}.lora_up.weight"}, 2, "up is missing"),
        (lambda t: t | {"something.else": torch.ones(1)}, 2, "something.else"),
        (lambda t: t | {f"{FIRST}.alpha": torch.tensor(0.0)}, 2, "alpha"),
        (lambda t: t | {f"{FIRST}.lora_up.weight": torch.ones(320, 3)}, 2, "ranks"),
        (lambda t: {"x": torch.ones(1)}, 2, "x"),
    ],
)
def test_doctor_finds_what_is_wrong(
    change: Callable[[State], State], code: int, words: str, broken: Callable[[Any], Path]
) -> None:
    diagnosis = pk.doctor(broken(change))
    assert diagnosis.code == code
    assert words in str(diagnosis)


def test_doctor_counts_stray_tensors_of_our_own_files(tmp_path: Path) -> None:
    path = source(tmp_path, "lora")
    file = write(tmp_path / "a.safetensors", load(path) | {"stray": torch.ones(2)}, metadata(path))
    diagnosis = pk.doctor(file)
    assert diagnosis.code == 1 and "stray" in str(diagnosis)
    no_name = {k: t for k, t in load(path).items() if k != "lin.up"}
    assert pk.doctor(write(tmp_path / "b.safetensors", no_name, metadata(path))).code == 2


def test_doctor_never_raises_for_what_is_in_a_file(tmp_path: Path) -> None:
    sound = source(tmp_path, "lora").read_bytes()
    generator = torch.Generator().manual_seed(0)
    noise = bytes(torch.randint(0, 256, (300,), generator=generator, dtype=torch.uint8).tolist())
    contents = [b"", b"x", noise, b"PK\x03\x04" + noise, sound[:100], sound[:-1], sound + b"x", b"\xff" * 64]
    for i in range(40):  # a damaged byte of the header, anywhere
        at = int(torch.randint(0, 8 + int.from_bytes(sound[:8], "little"), (1,), generator=generator))
        contents.append(sound[:at] + bytes([sound[at] ^ (1 << i % 8)]) + sound[at + 1 :])
    for i, content in enumerate(contents):
        path = tmp_path / "a.safetensors"
        path.write_bytes(content)
        assert pk.doctor(path).code in (0, 1, 2)
        if i < 8:
            assert pk.doctor(path).code == 2
    assert pk.doctor(tmp_path / "nothing.safetensors").code == 2
    assert pk.doctor(tmp_path).code == 2


def test_diff_measures_the_distance_of_two_changes(tmp_path: Path) -> None:
    hands = lycoris_hands("lora")
    one = lycoris_file(tmp_path / "1.safetensors", hands)
    half = lycoris_file(tmp_path / "2.safetensors", {k: h for k, h in hands.items() if k != "bare"})
    pk.rescale(half, 0.5, tmp_path / "half.safetensors")
    difference = pk.diff(one, tmp_path / "half.safetensors")
    assert {round(d, 6) for d in difference.distances.values()} == {0.5}
    assert len(difference.distances) == 2 and len(difference.only[0]) == 1 and not difference.equal
    assert "2 modules in both" in str(difference)
    assert pk.diff(one, one).equal
    dead = write(tmp_path / "dead.safetensors", {k: t * 0 if "up" in k else t for k, t in load(one).items()})
    assert set(pk.diff(one, dead).distances.values()) == {1.0}
    assert set(pk.diff(dead, one).distances.values()) == {math.inf}
    assert pk.diff(dead, dead).equal
    wide = lycoris_file(tmp_path / "wide.safetensors", {**hands, "lin": lora(12, 9)})
    assert math.inf in pk.diff(one, wide).distances.values()


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "full"])
def test_the_same_adapter_in_two_formats_is_equal(kind: str, tmp_path: Path) -> None:
    file = lycoris_file(tmp_path / "lycoris.safetensors", lycoris_hands(kind))
    model = net()
    pk.load(model, file)
    own = pk.save(model, tmp_path / "own.safetensors")
    assert pk.diff(file, own).equal and pk.diff(own, file).equal
    assert set(pk.diff(own, file).distances) == set(LYCORIS) or pk.diff(own, file).only == ((), ())
    assert not pk.diff(own, source(tmp_path, "lora")).equal


def test_without_norms_the_numbers_are_not_read(tmp_path: Path) -> None:
    """All else is as with them: kinds, ranks, scales, and what programs load."""
    up, down = torch.randn(8, 2), torch.full((2, 4), torch.nan)
    tensors = {"lora_unet_a.lora_up.weight": up, "lora_unet_a.lora_down.weight": down}
    save_file({**tensors, "lora_unet_a.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    read, header = (pk.inspect(tmp_path / "a.safetensors", norms=norms) for norms in (True, False))
    assert read.problems and not header.problems
    assert header.modules[0].norm is None and "‖ΔW‖ was not asked for" in str(header)
    assert header.modules == tuple(replace(module, problem="") for module in read.modules)
    assert (header.programs, header.loads) == (read.programs, read.loads)
