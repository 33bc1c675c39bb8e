"""What a merged file holds besides sums: metadata, other dtypes, the order of its tensors; and its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import peftkit as pk
from peftkit.errors import FileError, MergeError
from tests.support.files import header, listing, load, metadata, require_bits, write
from tests.support.hands import exact, full, hand_merge, loha, lora, lycoris_tensors
from tests.support.merging import prepared
from tests.support.models import net, state


def test_metadata_stays_but_for_what_a_merge_makes_untrue(tmp_path: Path) -> None:
    own = {
        "format": "pt",
        "modelspec.title": "Ein Modell: ☃",
        "sshs_model_hash": "1",
        "sshs_legacy_hash": "2",
        "modelspec.hash_sha256": "0x3",
    }
    base = write(tmp_path / "base.safetensors", state(net()), own)
    one = write(tmp_path / "one.safetensors", lycoris_tensors({"lin": full(12, 8)}))
    two = write(tmp_path / "sub" / "one.safetensors", {"lycoris_norm.w_norm": exact(12, seed=3)})
    pk.merge_checkpoint(base, {one: 0.7, two: -0.5}, tmp_path / "out.safetensors")
    found = metadata(tmp_path / "out.safetensors")
    assert {k: found[k] for k in ("format", "modelspec.title")} == {k: own[k] for k in ("format", "modelspec.title")}
    assert not {k for k in found if "hash" in k}
    recipe = json.loads(found["peftkit_merge"])
    assert "0.7" in json.dumps(recipe) and "-0.5" in json.dumps(recipe), "the recipe lacks a file or its strength"


def test_a_cast_makes_hashes_untrue_too(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state(net()), {"sshs_model_hash": "1"})
    file = write(tmp_path / "a.safetensors", lycoris_tensors({"lin": full(12, 8)}))
    pk.merge_checkpoint(base, {file: 0.0}, tmp_path / "out.safetensors", dtype=torch.float16)
    assert "sshs_model_hash" not in metadata(tmp_path / "out.safetensors")


@pytest.mark.parametrize("verify", [False, True])
def test_tensors_of_every_dtype_and_name_are_carried_over(verify: bool, tmp_path: Path) -> None:
    """Also of those this library does not compute with, empty ones, and single numbers."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 100, (3, 4), generator=generator)
    dtypes = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
    others = {f"numbers of {dtype}": numbers.to(dtype) for dtype in dtypes}
    others |= {"bool": numbers > 50, "complex": numbers.to(torch.complex64), "fp8": numbers.to(torch.float8_e5m2)}
    others |= {'"quoted" and ☃\n': numbers.double(), "empty": torch.zeros(0, 3), "one": torch.tensor(2.5)}
    base = write(tmp_path / "base.safetensors", {**others, "lin.weight": torch.ones(12, 8)})
    file = write(tmp_path / "a.safetensors", lycoris_tensors({"lin": full(12, 8)}))
    pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", verify=verify)
    merged = load(tmp_path / "out.safetensors")
    require_bits({k: t for k, t in merged.items() if k != "lin.weight"}, others)


def test_tensors_keep_their_order_and_the_file_its_form(tmp_path: Path) -> None:
    """As the reference reads it: no holes, offsets in order, the header a JSON object that begins with a quote."""
    base = write(tmp_path / "base.safetensors", state(net()))
    file = write(tmp_path / "a.safetensors", lycoris_tensors({"lin": full(12, 8)}))
    pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors")

    def order(path: Path) -> list[str]:
        entries = {k: v for k, v in header(path).items() if k != "__metadata__"}
        return sorted(entries, key=lambda key: entries[key]["data_offsets"])

    assert order(tmp_path / "out.safetensors") == order(base)
    assert (tmp_path / "out.safetensors").read_bytes()[8:10] == b'{"'


def test_a_plan_says_what_will_be_done(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state(net()))
    one = write(tmp_path / "one.safetensors", lycoris_tensors({"lin": full(12, 8), "bare": lora(8, 8)}))
    two = write(tmp_path / "two.safetensors", lycoris_tensors({"k1": loha(12, 8)}))
    plan = pk.plan_merge(base, {one: 0.7, two: -0.5})
    assert [(Path(p.file).name, p.name, p.kind, p.weight, p.strength) for p in plan.patches] == [
        ("one.safetensors", "lycoris_bare", "lora", "bare.weight", 0.7),
        ("one.safetensors", "lycoris_lin", "full", "lin.weight", 0.7),
        ("two.safetensors", "lycoris_k1", "loha", "k1.weight", -0.5),
    ]
    assert plan.table().row_count == 3
    assert "3 of them change" in str(plan) and "0.7" in str(plan) and "-0.5" in str(plan)
    assert plan.memory == 3 * 12 * 8 * 4 + 100_000_000


def test_a_pickled_base_is_refused_unless_it_may_be_read_as_data(tmp_path: Path) -> None:
    before = state(net())
    torch.save({"state_dict": before}, tmp_path / "base.ckpt")
    file = write(tmp_path / "a.safetensors", lycoris_tensors({"lin": full(12, 8)}))
    with pytest.raises(FileError, match="pickle"):
        pk.merge_checkpoint(tmp_path / "base.ckpt", {file: 1.0}, tmp_path / "out.safetensors")
    pk.merge_checkpoint(tmp_path / "base.ckpt", {file: 1.0}, tmp_path / "out.safetensors", allow_pickle=True)
    require_bits(load(tmp_path / "out.safetensors"), hand_merge(before, {"lin.weight": [(full(12, 8), 1.0)]}))


def test_a_component_that_is_kept_as_a_pickle_is_not_lost(tmp_path: Path) -> None:
    """Published pipelines have a safety checker as .bin: it goes along, or the merge says that it does not."""
    folder = tmp_path / "pipeline"
    write(folder / "unet" / "diffusion_pytorch_model.safetensors", state(net()))
    (folder / "model_index.json").write_text("{}")
    (folder / "safety_checker").mkdir()
    torch.save({"a": torch.ones(2)}, folder / "safety_checker" / "pytorch_model.bin")
    file = write(tmp_path / "a.safetensors", lycoris_tensors({"lin": full(12, 8)}))
    try:
        pk.merge_checkpoint(folder, {file: 1.0}, tmp_path / "out")
    except FileError:
        return
    assert listing(tmp_path / "out").keys() == listing(folder).keys()


def test_what_a_narrower_result_loses_is_measured_on_what_is_written(tmp_path: Path) -> None:
    """Against the base in that dtype: what is lost to it alone is no change of the adapter's."""
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    factors = {"a.lora_up.weight": torch.full((64, 1), 1e-3), "a.lora_down.weight": torch.full((1, 64), 1e-1)}
    base, file = write(tmp_path / "base.safetensors", {"a.weight": W}), write(tmp_path / "x.safetensors", factors)
    out = tmp_path / "out.safetensors"
    for dtype in (torch.bfloat16, torch.float16):
        (found,) = pk.merge_checkpoint(base, {file: 1.0}, out, dtype=dtype).weights
        delta = factors["a.lora_up.weight"] @ factors["a.lora_down.weight"]
        moved = load(out)["a.weight"].double() - W.to(dtype).double()
        assert found.change == pytest.approx(float(moved.norm()), rel=1e-5)
        assert found.lost == pytest.approx(float((delta - moved).norm() / delta.norm()), rel=1e-3)
    with pytest.raises(MergeError, match="too small"):
        pk.merge_checkpoint(base, {file: 1e-6}, tmp_path / "none.safetensors", dtype=torch.bfloat16)
    assert not (tmp_path / "none.safetensors").exists()


def test_the_result_does_not_take_the_place_of_an_adapter(tmp_path: Path) -> None:
    base, file = prepared(tmp_path)
    before = file.read_bytes()
    with pytest.raises(FileError, match="one of the inputs"):
        pk.merge_checkpoint(base, {file: 1.0}, file)
    assert file.read_bytes() == before
