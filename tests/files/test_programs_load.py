"""What `inspect` says every program makes of a file is what its reader makes of it: modules, refusals and scales."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import peftkit as pk
from peftkit.files.families.names import FAMILIES
from tests.support.files import write
from tests.support.readers import READERS, Refused

PROGRAMS = ("a1111", "forge", "comfyui", "kohya", "diffusers")
BLOCK = "down_blocks_1_attentions_0_transformer_blocks_0"


def lora(name: str, rows: int = 640, columns: int = 640, alpha: float | None = 2.0) -> dict[str, Tensor]:
    """Ones, so that the largest entry of ΔW is the scale."""
    factors = {f"{name}.lora_up.weight": torch.ones(rows, 1), f"{name}.lora_down.weight": torch.ones(1, columns)}
    return factors | ({} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)})


def loha(name: str) -> dict[str, Tensor]:
    parts = {"w1_a": (640, 1), "w1_b": (1, 640), "w2_a": (640, 1), "w2_b": (1, 640)}
    return {f"{name}.hada_{part}": torch.ones(size) for part, size in parts.items()} | {f"{name}.alpha": torch.ones(())}


def oft(name: str) -> dict[str, Tensor]:
    return {f"{name}.oft_blocks": torch.rand(160, 4, 4), f"{name}.alpha": torch.tensor(1e3)}


def of(name: str) -> str:
    return f"lora_unet_{BLOCK}_{name}"


OUTSIDE = {
    "lora_unet_conv_in.lora_up.weight": torch.ones(320, 1, 1, 1),
    "lora_unet_conv_in.lora_down.weight": torch.ones(1, 4, 3, 3),
    "lora_unet_conv_in.alpha": torch.ones(()),
}
FILES: dict[str, dict[str, Tensor]] = {
    "one alpha": {**lora(of("attn1_to_q")), **lora(of("attn1_to_k")), **lora(of("ff_net_2"), 640, 2560)},
    "three alphas": {
        **lora(of("attn1_to_q"), alpha=1.0),
        **lora(of("attn1_to_k"), alpha=2.0),
        **lora(of("attn1_to_v"), alpha=2.0),
        **lora(of("ff_net_2"), 640, 2560, alpha=4.0),
    },
    "a missing alpha": {
        **lora(of("attn1_to_q"), alpha=4.0),
        **lora(of("attn1_to_k"), alpha=4.0),
        **lora(of("ff_net_2"), 640, 2560, alpha=None),
    },
    "an alpha of 0": {**lora(of("attn1_to_q"), alpha=0.0), **lora(of("attn1_to_k"), alpha=0.0)},
    "of a layer outside the blocks": {**lora(of("attn1_to_q")), **OUTSIDE},
    "a LoHa": {**lora(of("attn1_to_q")), **loha(of("attn1_to_k"))},
    "a LoHa and an OFT": {**lora(of("attn1_to_q")), **loha(of("attn1_to_k")), **oft(of("attn1_to_v"))},
    "a whole ΔW": {**lora(of("attn1_to_q")), f"{of('attn1_to_k')}.diff": torch.ones(640, 640)},
    "OFT alone": {
        key: t
        for i in range(2)
        for block in (BLOCK, BLOCK.replace("attentions_0", "attentions_1"))
        for part in ("to_q", "to_k", "to_v", "to_out_0")
        for key, t in oft(f"lora_unet_{block}_attn{i + 1}_{part}").items()
        if i == 0 or part in ("to_q", "to_out_0")
    },
}


#: sd-scripts is told whether a file is of its LoRA or of its OFT
CELLS = [(program, label) for label in FILES for program in PROGRAMS if program != "kohya" or "OFT" not in label]


@pytest.mark.parametrize("program, label", CELLS)
def test_what_a_program_loads_and_skips_and_at_which_scale(program: str, label: str, tmp_path: Path) -> None:
    tensors = FILES[label]
    path = write(tmp_path / "x.safetensors", tensors)
    found = pk.inspect(path, **({"alpha_zero": "off"} if label == "an alpha of 0" else {}))
    said = found.programs[program]
    family = FAMILIES["sd15"]
    modules = [m for key in tensors for m in family.find(key.partition(".")[0])]
    weights = {m.name: torch.randn(m.shape) for m in modules}
    try:
        read = READERS[program](path, weights, "sd15", 1.0)
    except Refused:
        assert said.refused and said.loaded == 0, str(said)
        return
    assert not said.refused, str(said)
    changed = {name: float(delta.abs().max()) for name, delta in read.deltas.items()}
    off = 2 if label == "an alpha of 0" and program not in ("kohya",) else 0
    assert said.loaded == len(changed) + off, str(said)
    assert said.loaded + sum(said.skipped.values()) == len(weights)
    assert found.loads[program] == said.why
    if "OFT" not in label and said.loaded:
        assert said.scales is not None
        scales = [*changed.values(), *([0.0] * off)]
        assert said.scales == (pytest.approx(min(scales)), pytest.approx(max(scales)))


def test_reasons_are_grouped_and_names_of_unknown_models_are_said_not_to_be_checked(tmp_path: Path) -> None:
    tensors = {key: t for i in range(5) for key, t in lora(f"lycoris_blocks_{i}_q", 8, 8).items()}
    path = write(tmp_path / "x.safetensors", tensors)
    programs = pk.inspect(path).programs
    assert programs["lycoris"].loaded == 5 and str(programs["lycoris"]) == "all 5 at scale 2; names not checked"
    assert list(programs["comfyui"].skipped.values()) == [5]
    assert "models it knows" in programs["kohya"].refused
    lines = str(pk.doctor(path)).splitlines()
    assert lines[0] == "sound" and "LyCORIS: all 5 at scale 2; names not checked" in lines
    known = write(tmp_path / "known.safetensors", FILES["one alpha"])
    assert "names not checked" not in str(pk.inspect(known))


def test_forge_drops_a_file_with_more_than_twelve_tensors_that_it_has_no_place_for(tmp_path: Path) -> None:
    found = pk.inspect(write(tmp_path / "x.safetensors", FILES["OFT alone"]))
    assert not found.programs["forge"].refused and len(FILES["OFT alone"]) > 12
    blocks = {f"lora_unet_x{i}.oft_blocks": torch.rand(4, 2, 2) for i in range(13)}
    many = {**lora(of("attn1_to_q")), **{key.replace("x", f"{BLOCK}_attn1_to_q_"): t for key, t in blocks.items()}}
    assert pk.inspect(write(tmp_path / "y.safetensors", many)).programs["forge"].refused
