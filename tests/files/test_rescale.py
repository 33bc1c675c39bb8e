"""Rescaling an adapter file: s·ΔW, module by module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peftkit as pk
from peftkit.errors import ExportError, FileError
from tests.support.adapter_files import (
    ADDITIVE,
    LYCORIS,
    lycoris_file,
    lycoris_hands,
    matrices,
    require_deltas,
    source,
    truth,
)
from tests.support.files import listing, load, metadata, same_bits, write
from tests.support.hands import HANDS, exact, full
from tests.support.models import accepting, net
from tests.support.readers import READERS
from tests.support.zoo import ADAPTERS

# -- rescale -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, -2.0, 0.3])
@pytest.mark.parametrize("case", ADAPTERS)
def test_rescaling_multiplies_the_change_or_is_refused(case: str, factor: float, tmp_path: Path) -> None:
    path, out = source(tmp_path, case), tmp_path / "out.safetensors"
    before = listing(tmp_path)
    linear = (case in ADDITIVE and ADAPTERS[case].kind != "loldu") or ADAPTERS[case].kind in ("ia3", "glora")
    if not linear:
        with pytest.raises(ExportError, match="merged"):
            pk.rescale(path, factor, out)
        assert listing(tmp_path) == before
        return
    pk.rescale(path, factor, out)
    ours, theirs = truth(case), matrices(out)
    require_deltas(theirs, {k: factor * t for k, t in ours.items()}, 1e-12 if factor != 0.3 else 1e-6)
    tensors, was = load(out), load(path)
    assert tensors.keys() == was.keys()
    changed = {key for key in was if not same_bits(tensors[key], was[key])}
    per_module = 2 if ADAPTERS[case].kind == "glora" else 1
    assert len(changed) == per_module * len(accepting(case)), "other tensors than one factor of each product changed"


@pytest.mark.parametrize("kind", HANDS)
def test_rescaling_by_pattern_keeps_the_rest_of_a_foreign_file(kind: str, tmp_path: Path) -> None:
    hands = lycoris_hands(kind)
    file = lycoris_file(tmp_path / "a.safetensors", hands)
    vectors = {"lycoris_lin.diff_b": exact(12, seed=1), "lycoris_norm.w_norm": exact(12, seed=2)}
    file = write(tmp_path / "a.safetensors", load(file) | vectors, {"a": "b"})
    out = tmp_path / "out.safetensors"
    if kind == "dora out":
        with pytest.raises(ExportError, match="dora"):
            pk.rescale(file, 0.5, out)
        assert not out.exists()
        return
    pk.rescale(file, {"lycoris_lin": -0.5, "lycoris_n*": 2.0}, out)
    tensors, was = load(out), load(file)
    assert metadata(out) == {"a": "b"}
    weights = {name: net().get_submodule(name).weight.detach() for name in (*LYCORIS, "norm")}
    read = READERS["lycoris"](out, weights, None, 1.0)
    for name, hand in hands.items():
        factor = -0.5 if name == "lin" else 1.0
        assert torch.equal(read.deltas[name].flatten(1), factor * hand.delta(torch.zeros(0))), name
    assert torch.equal(tensors["lycoris_lin.diff_b"], -0.5 * was["lycoris_lin.diff_b"])
    assert torch.equal(tensors["lycoris_norm.w_norm"], 2 * was["lycoris_norm.w_norm"])


def test_a_factor_that_overflows_the_dtype_of_the_file_raises(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {k: t.half() for k, t in full(4, 4).keyed("lycoris_lin").items()})
    before = listing(tmp_path)
    with pytest.raises(FileError, match="not finite"):
        pk.rescale(file, 1e9, tmp_path / "out.safetensors")
    assert listing(tmp_path) == before


# -- what a review found -----------------------------------------------------------------------------------------------


def test_a_rescaled_file_reports_what_its_dtype_lost(tmp_path: Path) -> None:
    """In fp16 a tenth of a thousandth of a small factor is subnormal."""
    path, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    up, down = (exact(*shape, seed=i).half() * 0.01 for i, shape in enumerate(((64, 4), (4, 64))))
    write(path, {"a.lora_up.weight": up, "a.lora_down.weight": down})
    report = pk.rescale(path, 1e-4, out)
    written = load(out)["a.lora_up.weight"].double()
    lost = float((written - 1e-4 * up.double()).norm() / (1e-4 * up.double()).norm())
    assert report.error == pytest.approx(lost, rel=1e-6) and lost > 1e-3
