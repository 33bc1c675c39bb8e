"""Converting an adapter file: the same ΔW in another structure, or the nearest, and a report that says so truly."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import peftkit as pk
from peftkit.errors import ExportError, FileError, LossyError, OptionError, PeftkitError, WrongBaseError
from peftkit.files.formats import native
from tests.support.adapter_files import (
    ADDITIVE,
    READS_BASE,
    base_of,
    loaded,
    matrices,
    merged,
    moved,
    outputs,
    source,
    truth,
)
from tests.support.files import listing, load, metadata, require_bits, write
from tests.support.models import accepting, net, state
from tests.support.zoo import ADAPTERS

# -- what is measured --------------------------------------------------------------------------------------------------


def require_same_forward(case: str, result: Path, bound: float) -> None:
    """Every layer's output moves as the zoo's adapter moves it, to a share of the movement and of the output."""
    base, ours = moved(case)
    for i, (y, a, b) in enumerate(zip(base, ours, outputs(loaded(result)), strict=True)):
        error = float((a - b).norm())
        assert error <= bound * float((a - y).norm()) + 1e-6 * float(y.norm()), f"layer {i}: {error:.2e}"


# -- convert -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "loha", "full"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_every_adapter_is_the_same_change_as_another_kind(case: str, kind: str, tmp_path: Path) -> None:
    """With its base, for those that read theirs. The report, the forward and the merge into a file all agree."""
    path, out, base = source(tmp_path, case), tmp_path / "out.safetensors", base_of(tmp_path)
    given: dict[str, Any] = {"base": base} if case in READS_BASE else {}
    report = pk.convert(path, out, kind, exact=True, **given)
    assert report.error < 1e-5
    assert [m.name for m in report.modules] == list(native.decode(metadata(path), path).records)
    assert len(report.modules) == len(accepting(case))
    assert all(m.after.split()[0] == kind for m in report.modules)
    require_same_forward(case, out, 2e-5 if case in READS_BASE else 2e-6)
    pk.merge_checkpoint(base, {out: 1.0}, tmp_path / "merged.safetensors")
    before, theirs = merged(case)
    for key, ours in load(tmp_path / "merged.safetensors").items():
        gap, movement = ((ours - t[key]).double().norm() for t in (theirs, before))
        assert gap <= 1e-5 * movement + 1e-6 * before[key].double().norm(), key


@pytest.mark.parametrize("case", [case for case in ADDITIVE if ADAPTERS[case].kind == "lokr"])
def test_a_kronecker_product_stays_as_it_is(case: str, tmp_path: Path) -> None:
    path, out = source(tmp_path, case), tmp_path / "out.safetensors"
    report = pk.convert(path, out, "lokr", exact=True)
    assert {m.after for m in report.modules} == {"lokr"}
    require_same_forward(case, out, 1e-6)


def test_a_model_in_memory_serves_as_the_base(tmp_path: Path) -> None:
    path = source(tmp_path, "dora")
    for name, base in (("file", base_of(tmp_path)), ("model", net())):
        pk.convert(path, tmp_path / f"{name}.safetensors", "full", base=base)
    require_bits(load(tmp_path / "file.safetensors"), load(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("case", READS_BASE)
def test_what_depends_on_a_base_is_not_converted_without_it(case: str, tmp_path: Path) -> None:
    path = source(tmp_path, case)
    before = listing(tmp_path)
    for kind in ("lora", "full", "lokr"):
        with pytest.raises(ExportError, match="base"):
            pk.convert(path, tmp_path / "out.safetensors", kind)
    with pytest.raises(ExportError, match="base"):
        pk.resize(path, tmp_path / "out.safetensors", rank=1)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("case", ["loldu", "dora of loldu"])
def test_ldu_factors_that_are_not_in_the_file_are_never_made_up(case: str, tmp_path: Path) -> None:
    path = source(tmp_path, case, portable=False)
    whole = source(tmp_path, case, portable=True, name="whole.safetensors")
    before = listing(tmp_path)
    for verb in (
        lambda out: pk.convert(path, out, "lora"),
        lambda out: pk.resize(path, out, rank=1),
        lambda out: pk.combine({path: 1.0, whole: 1.0}, out),
    ):
        with pytest.raises(PeftkitError, match=r"base|portable"):
            verb(tmp_path / "out.safetensors")
    with pytest.raises(PeftkitError, match=r"base|portable"):
        pk.diff(path, whole)
    assert listing(tmp_path) == before
    pk.convert(path, tmp_path / "out.safetensors", "lora", base=base_of(tmp_path))
    require_same_forward(case, tmp_path / "out.safetensors", 1e-5)


LOSSY: dict[str, tuple[str, dict[str, Any]]] = {
    "lokr": ("lokr", {"factor": 4}),
    "lora rank": ("lora", {"rank": 1}),
    "lora energy": ("lora", {"energy": 0.7}),
    "loha threshold": ("loha", {"threshold": 0.6}),
    "lora bf16": ("lora", {"dtype": torch.bfloat16}),
    "full fp16": ("full", {"dtype": torch.float16}),
    "lora rank bf16": ("lora", {"rank": 2, "dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("lossy", LOSSY)
@pytest.mark.parametrize("case", ["lora", "loha", "lokr rank", "full"])
def test_the_errors_reported_are_those_of_the_file_that_was_written(case: str, lossy: str, tmp_path: Path) -> None:
    path, out = source(tmp_path, case), tmp_path / "out.safetensors"
    kind, options = LOSSY[lossy]
    report = pk.convert(path, out, kind, **options)
    before, after = truth(case), matrices(out)
    assert {m.name for m in report.modules} == before.keys()
    for m in report.modules:
        true = float((after[m.name] - before[m.name]).norm() / before[m.name].norm())
        assert m.error == pytest.approx(true, rel=1e-3, abs=2e-6), f"{m.name}: {m.before} as {m.after}"
    assert report.error == max(m.error for m in report.modules)
    sizes = (sum(t.nbytes for t in load(file).values()) for file in (path, out))
    assert (report.before, report.after) == tuple(sizes)


@pytest.mark.parametrize("lossy", ["lokr", "lora rank", "lora bf16", "full fp16"])
def test_exact_refuses_what_would_differ_and_writes_nothing(lossy: str, tmp_path: Path) -> None:
    path = source(tmp_path, "lora")
    kind, options = LOSSY[lossy]
    before = listing(tmp_path)
    with pytest.raises(LossyError, match="nothing was written"):
        pk.convert(path, tmp_path / "out.safetensors", kind, exact=True, **options)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f, o: pk.convert(f, o, "lorra"), "Did you mean 'lora'"),
        (lambda f, o: pk.convert(f, o, "lokr", rank=2), "no ranks to keep"),
        (lambda f, o: pk.convert(f, o, "full", energy=0.5), "no ranks to keep"),
        (lambda f, o: pk.convert(f, o, "lora", rank=2, energy=0.5), "rank"),
        (lambda f, o: pk.resize(f, o), "one of rank, energy and threshold"),
        (lambda f, o: pk.resize(f, o, rank=0), "from 1 was expected"),
        (lambda f, o: pk.resize(f, o, rank=True), "from 1 was expected"),
        (lambda f, o: pk.resize(f, o, energy=1.5), r"\(0, 1\]"),
        (lambda f, o: pk.resize(f, o, threshold=0.0), r"\(0, 1\]"),
        (lambda f, o: pk.resize(f, o, energy=math.nan), r"\(0, 1\]"),
        (lambda f, o: pk.convert(f, o.with_suffix(".pt"), "lora"), "safetensors"),
        (lambda f, o: pk.rescale(f, math.nan, o), "nan"),
        (lambda f, o: pk.rescale(f, {"no such": 2.0}, o), "no such"),
        (lambda f, o: pk.rescale(f, 2.0, o.with_suffix(".pt")), "safetensors"),
        (lambda f, o: pk.combine({f: 1.0}, o), "two"),
        (lambda f, o: pk.combine({f: 1.0, o: 1.0}, o, method="tie"), "Did you mean 'ties'"),
        (lambda f, o: pk.combine({f: 1.0, o: 1.0}, o, method="svd"), "rank= or energy="),
        (lambda f, o: pk.combine({f: 1.0, o: 1.0}, o, method="dare", density=0.0), "density"),
        (lambda f, o: pk.combine({f: math.inf, o: 1.0}, o), "inf"),
    ],
)
def test_options_without_a_meaning_raise_and_nothing_is_written(
    call: Callable[[Path, Path], Any], message: str, tmp_path: Path
) -> None:
    path = source(tmp_path, "lora")
    before = listing(tmp_path)
    with pytest.raises((OptionError, FileError), match=message):
        call(path, tmp_path / "out.safetensors")
    assert listing(tmp_path) == before


def test_the_header_keeps_what_stays_true(tmp_path: Path) -> None:
    """The adapter's name, its base's fingerprints and the facts of its training; so another base is still noticed."""
    path, out = source(tmp_path, "lora"), tmp_path / "out.safetensors"
    own = native.decode(metadata(path), path)
    changed = {k: t * 1.5 if t.is_floating_point() else t for k, t in state(net()).items()}
    base = write(tmp_path / "other.safetensors", changed)
    for verb in (
        lambda: pk.convert(path, out, "full"),
        lambda: pk.resize(path, out, rank=1),
        lambda: pk.rescale(path, 0.5, out),
    ):
        verb()
        header = native.decode(metadata(out), out)
        assert header.name == own.name
        assert header.base.keys() == own.base.keys()
        assert all((header.base[k] == own.base[k]).all() for k in own.base)
        with pytest.raises(WrongBaseError):
            pk.merge_checkpoint(base, {out: 1.0}, tmp_path / "merged.safetensors")
        assert header.training == {"steps": 5}
        out.unlink()
