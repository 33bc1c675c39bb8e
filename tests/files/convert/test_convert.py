"""From adapter file to adapter file: the same ΔW, or the nearest there is, and reports that say so truly."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftkit as pk
from peftkit.delta.truncation import Keep, nearest, nearest_kronecker, truncate
from peftkit.errors import ExportError, FileError, LossyError, MismatchError, OptionError, PeftkitError, WrongBaseError
from peftkit.files.formats import native
from tests.support.cells import tree
from tests.support.checkpoints import (
    HANDS,
    Hand,
    Net,
    State,
    accepting,
    adapt,
    exact,
    full,
    key_of,
    listing,
    load,
    loha,
    lora,
    metadata,
    net,
    require_bits,
    same_bits,
    state,
    taken,
    write,
)
from tests.support.readers import READERS
from tests.support.zoo import ADAPTERS, train

TARGETS = ("a1111", "forge", "comfyui", "kohya", "lycoris", "diffusers", "peft")


# ----------------------------------------------------------------------------------------------------- what is measured


def outputs(model: Net) -> list[Tensor]:
    """Of every layer that can be adapted, on inputs of its own."""
    generator = torch.Generator().manual_seed(5)

    def x(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    flat, image = x(3, 8), x(2, 8, 5, 6)
    with torch.no_grad():
        found = [model.lin(flat), model.bare(flat)]
        found += [layer(image) for layer in (model.k1, model.k3, model.transposed)]
        found += [layer(x(2, 8, 5, 6)) for layer in (model.grouped, model.transposed_grouped)]
        found.append(model.attention(x(4, 2, 8), x(5, 2, 8), x(5, 2, 8))[0])
        found.append(model.cross(x(4, 2, 8), x(5, 2, 4), x(5, 2, 12))[0])
    return found


def loaded(path: Path, **options: Any) -> Net:
    model = net().double()
    pk.load(model, path, **options)
    return model.eval()


def require_same_forward(case: str, result: Path, bound: float) -> None:
    """Every layer's output moves as the zoo's adapter moves it, to a share of the movement and of the output."""
    base, ours = moved(case)
    for i, (y, a, b) in enumerate(zip(base, ours, outputs(loaded(result)), strict=True)):
        error = float((a - b).norm())
        assert error <= bound * float((a - y).norm()) + 1e-6 * float(y.norm()), f"layer {i}: {error:.2e}"


def deltas_of(path: Path, base: Mapping[str, Tensor] | None = None) -> State:
    """ΔW of a file on `Net`, by weight, as merging it in fp64 shows it."""
    model = net().double()
    if base is not None:
        model.load_state_dict({k: v.double() for k, v in base.items()})
    before = state(model)
    pk.load(model, path, other_base=True)
    pk.merge(model)
    pk.unwrap(model, keep_merged=True)
    after = state(model)
    return {k: after[k] - before[k] for k in before if not torch.equal(before[k], after[k])}


def slices(deltas: State) -> State:
    """By the names adapters have: the projections of an attention are rows of one weight."""
    found: State = {}
    for key, delta in deltas.items():
        name = key.removesuffix(".weight")
        if name == "attention.in_proj_weight":
            for part, rows in zip("qkv", delta.chunk(3), strict=True):
                if bool(rows.any()):
                    found[f"attention.{part}_proj"] = rows
        else:
            found[name.removesuffix("_weight") if name.startswith("cross") else name] = delta
    return found


def flat(name: str, delta: Tensor) -> Tensor:
    """(rows, columns) as the layer of `Net` reads its weight."""
    if name == "transposed":
        return delta.transpose(0, 1).flatten(1)
    if name == "transposed_grouped":
        return delta.unflatten(0, (2, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    return delta.flatten(1)


def matrices(path: Path) -> State:
    return {name: flat(name, delta) for name, delta in slices(deltas_of(path)).items()}


def optimum(X: Tensor, k: int) -> float:
    """‖X − X_k‖/‖X‖ of the best X_k of rank k."""
    values = torch.linalg.svdvals(X.double())
    return float(values[k:].norm() / values.norm())


@cache
def saved(case: str, portable: bool = True) -> bytes:
    model = net()
    adapt(model, case)
    with tempfile.TemporaryDirectory() as folder:
        return pk.save(model, Path(folder) / "a.safetensors", portable=portable, training={"steps": 5}).read_bytes()


@cache
def moved(case: str) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of `Net`, and those with the zoo's adapter of `source`."""
    with tempfile.TemporaryDirectory() as folder:
        return outputs(net().double().eval()), outputs(loaded(source(Path(folder), case)))


@cache
def truth(case: str) -> State:
    """ΔW of the zoo's adapter of `source`, by weight."""
    with tempfile.TemporaryDirectory() as folder:
        return matrices(source(Path(folder), case))


@cache
def merged(case: str) -> tuple[State, State]:
    """`Net`, and it with the zoo's adapter of `source` merged into its file."""
    with tempfile.TemporaryDirectory() as folder:
        base, out = base_of(Path(folder)), Path(folder) / "out.safetensors"
        pk.merge_checkpoint(base, {source(Path(folder), case): 1.0}, out)
        return load(base), load(out)


def source(tmp_path: Path, case: str, portable: bool = True, name: str = "source.safetensors") -> Path:
    """A native file of an adapter of the zoo on every weight of `Net` that can have it."""
    path = tmp_path / name
    path.write_bytes(saved(case, portable))
    return path


def base_of(tmp_path: Path) -> Path:
    return write(tmp_path / "base.safetensors", state(net()))


READS_BASE = tuple(
    case
    for case, adapter in ADAPTERS.items()
    if adapter.kind in ("dora", "oft", "boft", "ia3", "glora") or adapter.options.get("decompose")
)
ADDITIVE = tuple(case for case in ADAPTERS if case not in READS_BASE)


# -------------------------------------------------------------------------------------------------------------- convert


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
        (lambda f, o: pk.resize(f, o, rank=0), "positive integer"),
        (lambda f, o: pk.resize(f, o, rank=True), "positive integer"),
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


# --------------------------------------------------------------------------------------------------------------- resize

KEEPS: list[dict[str, Any]] = [{"rank": 1}, {"rank": 3}, {"energy": 0.6}, {"energy": 0.95}, {"threshold": 0.5}]


@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize("case", ["lora", "lora tucker", "loha", "lokr", "lokr rank", "loldu", "full"])
def test_resizing_is_the_best_truncation(case: str, keep: dict[str, Any], tmp_path: Path) -> None:
    path, out = source(tmp_path, case), tmp_path / "out.safetensors"
    report = {m.name: m for m in pk.resize(path, out, **keep).modules}
    before, after = truth(case), matrices(out)
    for name, X in before.items():
        values = torch.linalg.svdvals(X)
        shares = values.square().cumsum(0) / values.square().sum()
        if "rank" in keep:
            k = min(keep["rank"], len(values))
        elif "energy" in keep:
            k = int((shares < keep["energy"]).sum()) + 1
        else:
            k = int((values >= keep["threshold"] * values[0]).sum())
        assert report[name].after == f"lora {k}" or "rank" in keep, name
        error = float((after[name] - X).norm() / X.norm())
        assert error == pytest.approx(optimum(X, k), rel=1e-4, abs=2e-6), name
        assert torch.linalg.matrix_rank(after[name], rtol=1e-5) <= k


def test_truncated_factors_are_balanced(tmp_path: Path) -> None:
    """Alike in size column by row, which is what fp16 holds best and training wants."""
    path, out = source(tmp_path, "loha"), tmp_path / "out.safetensors"
    pk.resize(path, out, rank=2)
    tensors = load(out)
    for name in accepting("loha"):
        up, down = tensors[f"{name}.up"].norm(dim=0), tensors[f"{name}.down"].norm(dim=1)
        torch.testing.assert_close(up, down, rtol=1e-4, atol=1e-6)


SPECTRA: dict[str, Callable[[int, float], Tensor]] = {
    "flat": lambda n, a: torch.ones(n),
    "power": lambda n, a: torch.arange(1, n + 1) ** (-2 * a),
    "exponential": lambda n, a: torch.exp(-a * torch.arange(n)),
    "noisy low rank": lambda n, a: torch.cat([torch.full((6,), 10.0), torch.full((n - 6,), a)]),
    "step": lambda n, a: torch.cat([torch.full((n // 2,), 1.0), torch.full((n - n // 2,), 1e-3 * a)]),
    "low rank": lambda n, a: torch.cat([torch.ones(5), torch.zeros(n - 5)]),
}


def with_spectrum(values: Tensor, rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    U = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(columns, n, generator=generator, dtype=torch.float64))[0]
    return (U * values.double()) @ V.mT


@given(
    spectrum=st.sampled_from(list(SPECTRA)),
    decay=st.floats(0.05, 1.0),
    rank=st.integers(1, 12),
    sizes=st.tuples(st.integers(20, 140), st.integers(20, 140)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_the_nearest_matrix_of_a_rank_is_within_2_percent_of_the_optimum(
    spectrum: str, decay: float, rank: int, sizes: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    values = SPECTRA[spectrum](min(sizes), decay).double()
    X = with_spectrum(values, *sizes, seed).to(dtype)
    found, lost = nearest(X, Keep(rank=rank), seed=seed)
    best = float(values[rank:].norm() / values.norm())
    true = float((found.B.double() @ found.A.double() - X.double()).norm() / X.double().norm())
    rounding = 2e-6 if dtype == torch.float32 else 1e-13
    assert found.rank <= rank
    assert true <= 1.02 * best + rounding
    assert lost == pytest.approx(true, rel=1e-2, abs=max(rounding, 1e-7)), "what is reported is not the truth"


@given(
    spectrum=st.sampled_from(["power", "exponential", "noisy low rank", "flat"]),
    decay=st.floats(0.05, 1.0),
    share=st.floats(0.3, 0.999),
    threshold=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_ranks_kept_are_the_fewest_that_do(
    spectrum: str, decay: float, share: float, threshold: bool, seed: int
) -> None:
    values = SPECTRA[spectrum](120, decay).double()
    X = with_spectrum(values, 150, 120, seed)
    keep = Keep(threshold=share) if threshold else Keep(energy=share)
    found, _ = nearest(X, keep, seed=seed)
    if threshold:
        sure = (int((values >= t * values[0]).sum()) for t in (share * 1.02, share * 0.98))
    else:
        shares = values.square().cumsum(0) / values.square().sum()
        sure = (int((shares < t).sum()) + 1 for t in (share * (1 - 1e-3), share + 1e-3 * (1 - share)))
    fewest, most = sure
    assert fewest <= found.rank <= max(most, 1) + 1


@given(rank=st.integers(1, 9), keep=st.integers(1, 9), scale=st.floats(-4, 4), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_truncating_factors_is_truncating_their_product(rank: int, keep: int, scale: float, seed: int) -> None:
    from peftkit.delta import LowRank

    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(20, rank, generator=generator, dtype=torch.float64) * 10**scale
    A = torch.randn(rank, 14, generator=generator, dtype=torch.float64)
    found, lost = truncate(LowRank(B, A), Keep(rank=keep))
    X = B @ A
    true = float((found.dense() - X).norm() / X.norm())
    assert true == pytest.approx(optimum(X, keep), rel=1e-6, abs=1e-12)
    assert lost == pytest.approx(true, rel=1e-6, abs=1e-7)


@given(
    outer=st.sampled_from([(2, 3), (1, 4), (6, 1), (4, 4), (3, 6)]),
    noise=st.sampled_from([0.0, 1e-3, 0.3, 3.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_nearest_kronecker_product_is_the_leading_pair_of_the_rearranged_matrix(
    outer: tuple[int, int], noise: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    (a, c), (m, n) = outer, (12, 12)
    X = torch.kron(random(a, c), random(m // a, n // c)) + noise * random(m, n)
    C, D, lost = nearest_kronecker(X, outer)
    R = torch.stack(
        [X[i * m // a : (i + 1) * m // a, j * n // c : (j + 1) * n // c].flatten() for i in range(a) for j in range(c)]
    )
    values = torch.linalg.svdvals(R)
    true = float((torch.kron(C, D) - X).norm() / X.norm())
    assert true == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-6, abs=1e-7)
    assert lost == pytest.approx(true, rel=1e-6, abs=1e-7)


# -------------------------------------------------------------------------------------------------------------- formats


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
SD15: dict[str, Callable[[], nn.Module]] = {
    f"{ATTENTION}.attn2.to_k": lambda: nn.Linear(768, 320, bias=False),
    f"{ATTENTION}.attn1.to_q": lambda: nn.Linear(320, 320, bias=False),
    "down_blocks.0.attentions.0.proj_in": lambda: nn.Conv2d(320, 320, 1),
}
KOHYA = {path: f"lora_unet_{path.replace('.', '_')}" for path in SD15}
ENTRIES = {
    "ss_base_model_version": "sd_v1",
    "ss_tag_frequency": '{"a": {"b": 1}}',
    "ss_output_name": "style",
    "ss_network_dim": "4",
    "ss_network_alpha": "2",
    "ss_network_module": "lycoris.kohya",
    "ss_network_args": '{"algo": "loha", "preset": "full"}',
    "modelspec.title": "Stil ☃",
    "modelspec.hash_sha256": "0x12",
    "sshs_model_hash": "34",
    "sshs_legacy_hash": "56",
}
TRUE = ("ss_base_model_version", "ss_tag_frequency", "ss_output_name", "modelspec.title")


def sd15_model() -> nn.Module:
    torch.manual_seed(0)
    return tree({path: make() for path, make in SD15.items()})


def base_weights() -> State:
    return {f"unet.{path}": layer.weight.detach() for path in SD15 for layer in [sd15_model().get_submodule(path)]}


def kohya_hands(kind: str = "lora") -> dict[str, Hand]:
    shapes = {path: make().weight.shape[:2] for path, make in SD15.items()}
    return {path: HANDS[kind](*shape, seed=10 * i) for i, (path, shape) in enumerate(shapes.items())}


def ragged_hands() -> dict[str, Hand]:
    """LoHas of rank 1, 2 and 3, which are of 1, 4 and 9 as LoRAs."""
    shapes = {path: make().weight.shape[:2] for path, make in SD15.items()}
    return {path: loha(*shape, rank=i + 1, seed=10 * i) for i, (path, shape) in enumerate(shapes.items())}


def kohya_file(path: Path, hands: Mapping[str, Hand], entries: dict[str, str] | None = None) -> Path:
    """The kernel has dimensions in the tensors that know it: LoHa's factors are flat, as is LoKr's small one."""
    tensors: State = {}
    for name, hand in hands.items():
        for key, tensor in hand.keyed(KOHYA[name]).items():
            shaped = key.rpartition(".")[2] in ("weight", "diff", "lokr_w2") and "proj_in" in name
            tensors[key] = tensor.reshape(*tensor.shape, 1, 1) if shaped else tensor
    return write(path, tensors, entries)


def read_as(target: str, path: Path) -> State:
    """ΔW as a program reads it, by path; every key must have an effect."""
    read = READERS[target](path, base_weights(), "sd15", 1.0)
    assert read.ignored == [] and read.biases == {}
    return {name.removeprefix("unet."): delta.flatten(1) for name, delta in read.deltas.items()}


def require_deltas(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        error = (found[name].double() - expected[name].double()).norm() / expected[name].double().norm()
        assert error <= bound, f"{name}: {error:.2e}"


def true_deltas(hands: Mapping[str, Hand]) -> State:
    return {name: hand.delta(torch.zeros(0)) for name, hand in hands.items()}


VERBS: dict[str, Callable[[Path, Path], Any]] = {
    "convert to lora": lambda file, out: pk.convert(file, out, "lora"),
    "convert to full": lambda file, out: pk.convert(file, out, "full"),
    "convert to lokr": lambda file, out: pk.convert(file, out, "lokr"),
    "resize": lambda file, out: pk.resize(file, out, rank=3),
    "rescale": lambda file, out: pk.rescale(file, 0.5, out),
    "combine": lambda file, out: pk.combine({file: 0.5, file.with_name("second.safetensors"): 0.5}, out),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "full"])
def test_a_kohya_file_stays_one_with_the_same_module_names(kind: str, verb: str, tmp_path: Path) -> None:
    """Read back by others as this library reads it; true entries kept, hashes of other bytes dropped."""
    file = kohya_file(tmp_path / "a.safetensors", kohya_hands(kind), dict(ENTRIES))
    kohya_file(tmp_path / "second.safetensors", kohya_hands(kind))
    out = tmp_path / "out.safetensors"
    report = VERBS[verb](file, out)
    keys = load(out)
    assert {key.partition(".")[0] for key in keys} == set(KOHYA.values())
    assert all(f"{module}.alpha" in keys or f"{module}.diff" in keys for module in KOHYA.values())
    expected = {k: t * (0.5 if verb == "rescale" else 1.0) for k, t in true_deltas(kohya_hands(kind)).items()}
    if not verb.endswith("lokr") and verb != "resize":
        for target in ("a1111", "comfyui", "forge"):
            require_deltas(read_as(target, out), expected)
    ours = {KOHYA[name]: delta for name, delta in read_as("a1111", out).items()}
    for m in report.modules:
        true = expected[next(n for n, k in KOHYA.items() if k == m.name)]
        error = float((ours[m.name] - true).norm() / true.norm())
        assert m.error == pytest.approx(error, rel=1e-3, abs=2e-6)
    entries = metadata(out)
    assert {k: entries.get(k) for k in TRUE} == {k: ENTRIES[k] for k in TRUE}
    digest = hashlib.sha256(out.read_bytes()[8 + int.from_bytes(out.read_bytes()[:8], "little") :]).hexdigest()
    assert entries.get("sshs_model_hash", digest) == digest
    assert "sshs_legacy_hash" not in entries
    assert "modelspec.hash_sha256" not in entries, "the hash of other bytes"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_errors_reported_are_those_of_a_kohya_file_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Whose ranks differ, so that some factors are scaled to the alpha they share before they are rounded."""
    file = kohya_file(tmp_path / "a.safetensors", ragged_hands())
    twin = kohya_file(tmp_path / "twin.safetensors", ragged_hands())
    out, expected = tmp_path / "out.safetensors", true_deltas(ragged_hands())
    verbs: tuple[Callable[[], Any], ...] = (
        lambda: pk.convert(file, out, "lora", dtype=dtype),
        lambda: pk.resize(file, out, rank=3, dtype=dtype),
        lambda: pk.combine({file: 0.25, twin: 0.75}, out, method="svd", energy=0.9, dtype=dtype),
    )
    for verb in verbs:
        report, found = verb(), read_as("a1111", out)
        assert len({m.after for m in report.modules}) > 1
        for m in report.modules:
            name = next(n for n, k in KOHYA.items() if k == m.name)
            true = float((found[name] - expected[name]).norm() / expected[name].norm())
            assert m.error == pytest.approx(true, rel=1e-3, abs=1e-7), m.name


def test_a_file_of_another_kind_does_not_say_how_the_first_was_trained(tmp_path: Path) -> None:
    """ss_network_dim, _alpha and _args describe LoHa's factors, which are not there any more."""
    file = kohya_file(tmp_path / "a.safetensors", kohya_hands("loha"), dict(ENTRIES))
    pk.convert(file, tmp_path / "out.safetensors", "lora")
    entries = metadata(tmp_path / "out.safetensors")
    assert not {"ss_network_dim", "ss_network_alpha"} & entries.keys()
    assert "loha" not in entries.get("ss_network_args", "")


def test_ranks_that_differ_share_one_alpha(tmp_path: Path) -> None:
    """diffusers applies the commonest alpha to every module (FORMATS.md §0.3)."""
    file = kohya_file(tmp_path / "a.safetensors", ragged_hands())
    pk.resize(file, tmp_path / "out.safetensors", energy=0.95)
    tensors = load(tmp_path / "out.safetensors")
    ranks = {t.shape[0] for key, t in tensors.items() if "lora_down" in key}
    assert len({float(t) for key, t in tensors.items() if key.endswith("alpha")}) == 1
    assert len(ranks) > 1 and all(t.dim() == 0 and t > 0 for key, t in tensors.items() if key.endswith("alpha"))
    require_deltas(read_as("diffusers", tmp_path / "out.safetensors"), read_as("a1111", tmp_path / "out.safetensors"))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_kernel_that_a_file_holds_flattened_is_written_in_the_shape_that_programs_read(
    kind: str, tmp_path: Path
) -> None:
    """LoHa's factors say the fan-in only. Names and shapes say the model, and that says the kernel."""
    path = "down_blocks.0.resnets.0.conv1"
    hand = loha(320, 320 * 9, seed=3)
    file = write(tmp_path / "a.safetensors", hand.keyed(f"lora_unet_{path.replace('.', '_')}"))
    out = tmp_path / "out.safetensors"
    pk.convert(file, out, kind, exact=True)
    weights = {f"unet.{path}": torch.zeros(320, 320, 3, 3)}
    for target in ("a1111", "comfyui", "forge", *(("kohya", "diffusers") if kind == "lora" else ())):
        read = READERS[target](out, weights, "sd15", 1.0)
        assert read.ignored == [], target
        require_deltas({"x": read.deltas[f"unet.{path}"].flatten(1)}, {"x": hand.delta(torch.zeros(0))})


def test_a_file_with_diffusers_names_keeps_them(tmp_path: Path) -> None:
    hands = kohya_hands("lora")
    tensors: State = {}
    for path, hand in hands.items():
        up, down = hand.tensors["lora_up.weight"] / 2, hand.tensors["lora_down.weight"]
        ones = (1,) * (2 if "proj_in" in path else 0)
        tensors[f"unet.{path}.lora_B.weight"] = up.reshape(*up.shape, *ones)
        tensors[f"unet.{path}.lora_A.weight"] = down.reshape(*down.shape, *ones)
    file = write(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    out = tmp_path / "out.safetensors"
    for verb, factor in ((lambda: pk.resize(file, out, rank=2), 1.0), (lambda: pk.rescale(file, -0.5, out), -0.5)):
        verb()
        assert load(out).keys() == tensors.keys()
        expected = {k: t * factor for k, t in true_deltas(hands).items()}
        require_deltas(read_as("diffusers", out), expected)
        assert metadata(out)["format"] == "pt"


LYCORIS = ("lin", "bare", "attention.out_proj")


def lycoris_file(path: Path, hands: Mapping[str, Hand]) -> Path:
    keyed = {f"lycoris_{name.replace('.', '_')}": hand for name, hand in hands.items()}
    return write(path, {k: t for name, hand in keyed.items() for k, t in hand.keyed(name).items()})


def lycoris_hands(kind: str) -> dict[str, Hand]:
    return {name: HANDS[kind](12 if name == "lin" else 8, 8, seed=i) for i, name in enumerate(LYCORIS)}


@pytest.mark.parametrize("kind", ["lora", "dora out"])
def test_a_file_converted_with_its_base_keeps_its_module_names(kind: str, tmp_path: Path) -> None:
    hands = lycoris_hands(kind)
    file, base = lycoris_file(tmp_path / "a.safetensors", hands), base_of(tmp_path)
    out = tmp_path / "out.safetensors"
    report = pk.convert(file, out, "full", base=base)
    assert {key.partition(".")[0] for key in load(out)} == {f"lycoris_{n.replace('.', '_')}" for n in hands}
    assert report.error < 1e-5
    weights = {name: net().get_submodule(name).weight.detach() for name in hands}
    read = READERS["lycoris"](out, weights, None, 1.0)
    assert read.ignored == []
    expected = {name: hand.delta(weights[name].double()) for name, hand in hands.items()}
    require_deltas(read.deltas, expected, 1e-5)


# -- PEFT's own folders ------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.block = nn.Linear(8, 12), nn.ModuleDict({"lin": nn.Linear(12, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["lin"](torch.tanh(self.lin(x)))


def peft_folder(path: Path, kind: str = "lora") -> tuple[Path, Tensor]:
    """A folder PEFT wrote, and what its model computes."""
    options: dict[str, Any] = {"target_modules": ["lin"]}
    config = {
        "lora": peft.LoraConfig(r=4, lora_alpha=2, rank_pattern={"block.lin": 3}, **options),
        "rslora": peft.LoraConfig(r=4, lora_alpha=2, use_rslora=True, **options),
        "loha": peft.LoHaConfig(r=2, alpha=3, **options),
        "lokr": peft.LoKrConfig(r=2, alpha=3, decompose_factor=2, **options),
    }[kind]
    model = peft.get_peft_model(Two(), config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    model.save_pretrained(path)
    with torch.no_grad():
        return path, model.eval()(X)


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


def from_peft(path: Path) -> Tensor:
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(Two(), str(path)).eval()(X)


@pytest.mark.parametrize("kind", ["lora", "rslora", "loha", "lokr"])
def test_a_folder_of_peft_stays_one_that_peft_loads(kind: str, tmp_path: Path) -> None:
    folder, expected = peft_folder(tmp_path / "a", kind)
    kinds = {"lora": ("lora", "loha"), "rslora": ("lora",), "loha": ("lora", "loha"), "lokr": ("lora", "lokr")}
    for other in kinds[kind]:
        out = tmp_path / f"to {other}"
        report = pk.convert(folder, out, other, exact=True)
        assert report.error < 1e-5
        torch.testing.assert_close(from_peft(out), expected, rtol=1e-4, atol=1e-5)
        assert {m.name for m in report.modules} == {"lin", "block.lin"}
    before = listing(tmp_path)
    with pytest.raises((OptionError, ExportError), match="PEFT"):
        pk.convert(folder, tmp_path / "to full", "full")
    with pytest.raises(FileError, match="there already"):
        pk.convert(folder, tmp_path / "to lora", "lora")
    assert listing(tmp_path) == before


def test_a_resized_and_a_rescaled_folder_of_peft_load_there(tmp_path: Path) -> None:
    folder, _ = peft_folder(tmp_path / "a")
    pk.resize(folder, tmp_path / "resized", rank=2)
    pk.rescale(folder, {"block*": -0.5}, tmp_path / "rescaled")
    pk.combine({folder: 0.25, tmp_path / "resized": 0.75}, tmp_path / "combined", method="cat")
    for name in ("resized", "rescaled", "combined"):
        model = Two()
        pk.load(model, tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(from_peft(tmp_path / name), model.eval()(X), rtol=1e-4, atol=1e-5)
    W = {name: Two().get_submodule(name).weight.detach() for name in ("lin", "block.lin")}
    whole, resized, rescaled, combined = (
        READERS["peft"](tmp_path / name, W, None, 1.0).deltas for name in ("a", "resized", "rescaled", "combined")
    )
    for name in W:
        error = float((resized[name] - whole[name]).norm() / whole[name].norm())
        assert error == pytest.approx(optimum(whole[name], 2), rel=1e-4)
        torch.testing.assert_close(combined[name], 0.25 * whole[name] + 0.75 * resized[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rescaled["lin"], whole["lin"])
    torch.testing.assert_close(rescaled["block.lin"], -0.5 * whole["block.lin"])


# -------------------------------------------------------------------------------------------------------------- rescale


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


# -------------------------------------------------------------------------------------------------------------- combine


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


# -------------------------------------------------------------------------------------------------------------- extract


def tuned(base: State, size: float = 0.1, seed: int = 3, rank: int | None = None) -> State:
    """The base with every float moved: by a matrix of that rank, or of full rank."""
    generator = torch.Generator().manual_seed(seed)
    found: State = {}
    for key, t in base.items():
        if not t.is_floating_point():
            found[key] = t.clone()
            continue
        if rank is None or t.dim() < 2:
            step = torch.randn(t.shape, generator=generator)
        else:
            n = t.flatten(1).shape[1]
            step = torch.randn(len(t), rank, generator=generator) @ torch.randn(rank, n, generator=generator)
        found[key] = (t.float() + size * step.reshape(t.shape)).to(t.dtype)
    return found


MATRICES = [key for key, t in state(net()).items() if t.dim() > 1]
VECTORS = [key for key, t in state(net()).items() if t.dim() == 1 and t.is_floating_point()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_extracting_all_of_the_difference_gives_the_tuned_model_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """In 16 bits bit for bit. In fp32 tuned − base is rounded itself: here 3 % of the entries come back a step off."""
    before = state(net(dtype))
    after = tuned(before)
    base, model = write(tmp_path / "base.safetensors", before), write(tmp_path / "tuned.safetensors", after)
    report = pk.extract(model, base, tmp_path / "a.safetensors", "full")
    assert all(w.lost == 0.0 for w in report.weights)
    pk.merge_checkpoint(base, {tmp_path / "a.safetensors": 1.0}, tmp_path / "out.safetensors")
    merged = load(tmp_path / "out.safetensors")
    assert set(report.left) == set(VECTORS)
    assert {key_of(w.weight) for w in report.weights} == set(MATRICES)
    for key in MATRICES:
        if dtype == torch.float32:
            step = torch.maximum(before[key].abs(), after[key].abs()) * 2.0**-23
            assert ((merged[key] - after[key]).abs() <= step).all(), key
            assert (merged[key] != after[key]).float().mean() < 0.1, key
        else:
            assert same_bits(merged[key], after[key]), key
    for key in VECTORS:
        assert same_bits(merged[key], before[key]), key


@pytest.mark.parametrize("keep", [{"rank": 2}, {"rank": 4}, {"energy": 0.9}, {"threshold": 0.3}], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_the_loss_of_an_extracted_lora_is_what_the_tuned_model_lacks(
    dtype: torch.dtype | None, keep: dict[str, Any], tmp_path: Path
) -> None:
    before = state(net())
    after = tuned(before)
    base, model = write(tmp_path / "base.safetensors", before), write(tmp_path / "tuned.safetensors", after)
    report = pk.extract(model, base, tmp_path / "a.safetensors", dtype=dtype, **keep)
    pk.merge_checkpoint(base, {tmp_path / "a.safetensors": 1.0}, tmp_path / "out.safetensors")
    found = load(tmp_path / "out.safetensors")
    lacking = whole = 0.0
    for w in report.weights:
        ours, theirs, base_weight = (taken(tensors, w.weight).double() for tensors in (found, after, before))
        X_, gap = theirs - base_weight, float((ours - theirs).norm())
        assert w.norm == pytest.approx(float(X_.norm()), rel=1e-5)
        assert w.lost == pytest.approx(gap / w.norm, rel=1e-2, abs=1e-5), w.weight
        if "rank" in keep:
            rounding = 1e-4 if dtype is None else 5e-4  # factors in fp16 cost 3e-4 of what they make
            assert w.lost == pytest.approx(optimum(X_.flatten(1), keep["rank"]), rel=2e-2, abs=rounding)
            assert w.rank == min(keep["rank"], *X_.flatten(1).shape)
        lacking, whole = lacking + gap**2, whole + w.norm**2
    left = sum(float((after[key].double() - before[key].double()).norm()) ** 2 for key in report.left)
    lacking, whole = lacking + left, whole + left
    assert report.lost == pytest.approx(math.sqrt(lacking / whole), rel=1e-2)
    assert report.bytes == sum(t.nbytes for t in load(tmp_path / "a.safetensors").values())


def test_a_difference_of_low_rank_is_found_whole(tmp_path: Path) -> None:
    """Its loss is the rounding of fp32, and is reported as no more."""
    before = {"lin.weight": torch.randn(96, 80, generator=torch.Generator().manual_seed(0))}
    base = write(tmp_path / "base.safetensors", before)
    model = write(tmp_path / "tuned.safetensors", tuned(before, rank=3))
    report = pk.extract(model, base, tmp_path / "a.safetensors", rank=3)
    assert report.lost < 1e-5
    pk.merge_checkpoint(base, {tmp_path / "a.safetensors": 1.0}, tmp_path / "out.safetensors")
    merged, after = (load(tmp_path / f"{n}.safetensors")["lin.weight"].double() for n in ("out", "tuned"))
    assert float((merged - after).norm() / (after - before["lin.weight"]).norm()) < 1e-5


def test_a_planted_kronecker_product_is_recovered(tmp_path: Path) -> None:
    before = {k: t for k, t in state(net()).items() if k in ("lin.weight", "k3.weight")}
    C = exact(4, 4, seed=1)  # of lokr's factors up to 4: 12 rows and 8 channels are 3·4 and 2·4, sorted
    after = dict(before)
    outer = {"lin.weight": (3, 2), "k3.weight": (3, 2)}
    for key, (a, c) in outer.items():
        W = before[key].flatten(1)
        D = exact(W.shape[0] // a, W.shape[1] // c, seed=9)
        after[key] = (W + torch.kron(C[:a, :c].contiguous(), D)).reshape(before[key].shape)
    base, model = write(tmp_path / "base.safetensors", before), write(tmp_path / "tuned.safetensors", after)
    report = pk.extract(model, base, tmp_path / "a.safetensors", "lokr", factor=4)
    assert all(w.lost < 1e-4 for w in report.weights)
    pk.merge_checkpoint(base, {tmp_path / "a.safetensors": 1.0}, tmp_path / "out.safetensors")
    for key, merged in load(tmp_path / "out.safetensors").items():
        moved = (after[key] - before[key]).norm()
        assert (merged - after[key]).norm() < 1e-5 * moved, key


def test_weights_that_did_not_change_and_tensors_that_are_no_matrices_are_reported(tmp_path: Path) -> None:
    before = state(net())
    after = {**before, "lin.weight": before["lin.weight"] + 1, "norm.bias": before["norm.bias"] + 1}
    base, model = write(tmp_path / "base.safetensors", before), write(tmp_path / "tuned.safetensors", after)
    report = pk.extract(model, base, tmp_path / "a.safetensors", rank=1)
    assert [w.weight for w in report.weights] == ["lin"]
    assert report.left == ("norm.bias",)
    assert set(report.unchanged) == {k for k, t in before.items() if t.is_floating_point()} - {
        "lin.weight",
        "norm.bias",
    }
    assert "norm.bias" in str(report) and report.table().row_count == 1


def test_extraction_can_be_of_some_weights(tmp_path: Path) -> None:
    before = state(net())
    base = write(tmp_path / "base.safetensors", before)
    model = write(tmp_path / "tuned.safetensors", tuned(before))
    for targets, found in (("k*", {"k1", "k3"}), (["lin.weight", "bare"], {"lin", "bare"})):
        report = pk.extract(model, base, tmp_path / "a.safetensors", rank=1, targets=targets)
        assert {w.weight for w in report.weights} == found
    with pytest.raises(OptionError, match="'no such' matches no tensor"):
        pk.extract(model, base, tmp_path / "b.safetensors", rank=1, targets=["k*", "no such"])
    with pytest.raises(MismatchError, match="nothing to extract"):
        pk.extract(base, base, tmp_path / "b.safetensors", rank=1)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("layer", ["attention", "one layer", "transposed"])
def test_what_is_extracted_of_any_layer_merges_and_loads(layer: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make: dict[str, Callable[[], nn.Module]] = {
        "attention": lambda: nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}),
        "one layer": lambda: nn.Linear(8, 8),
        "transposed": lambda: nn.ModuleDict({"up": nn.ConvTranspose2d(8, 8, 3)}),
    }
    model = make[layer]()
    before = state(model)
    after = {k: t if t.dim() < 2 else t + 0.1 * torch.randn_like(t) for k, t in before.items()}
    base, goal = write(tmp_path / "base.safetensors", before), write(tmp_path / "tuned.safetensors", after)
    pk.extract(goal, base, tmp_path / "a.safetensors", kind, **({"rank": 8} if kind == "lora" else {}))
    pk.merge_checkpoint(base, {tmp_path / "a.safetensors": 1.0}, tmp_path / "out.safetensors")
    for key, merged in load(tmp_path / "out.safetensors").items():
        torch.testing.assert_close(merged, after[key], rtol=1e-5, atol=1e-5)
    try:
        pk.load(model, tmp_path / "a.safetensors")
    except (MismatchError, WrongBaseError):
        return  # a file need not fit a model, but if it does it must be the same change
    pk.merge(model)
    pk.unwrap(model, keep_merged=True)
    for key, merged in state(model).items():
        torch.testing.assert_close(merged, after[key], rtol=1e-5, atol=1e-5)


def test_checkpoints_that_are_not_one_model_have_no_difference(tmp_path: Path) -> None:
    before = state(net())
    base = write(tmp_path / "base.safetensors", before)
    infinite = {**before, "lin.weight": torch.full_like(before["lin.weight"], math.inf)}
    others = {
        "lacking": {k: t for k, t in before.items() if k != "lin.weight"},
        "more": {**before, "x": torch.ones(2)},
        "shape": {**before, "lin.weight": torch.ones(12, 9)},
        "infinite": infinite,
        "the same": before,
    }
    for name, tensors in others.items():
        model = write(tmp_path / f"{name}.safetensors", tensors)
        with pytest.raises(MismatchError):
            pk.extract(model, base, tmp_path / "a.safetensors", rank=1)
        assert not (tmp_path / "a.safetensors").exists()
    model = write(tmp_path / "tuned.safetensors", tuned(before))
    for kind, options in (("lora", {}), ("full", {"rank": 2}), ("lokr", {"energy": 0.5}), ("loha", {"rank": 2})):
        with pytest.raises(OptionError):
            pk.extract(model, base, tmp_path / "a.safetensors", kind, **options)


# -------------------------------------------------------------------------------------------------------------- inspect


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


# -- what a review found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["resize", "convert", "combine"])
@torch.no_grad()
def test_layers_that_keep_their_weight_the_other_way_round_stay_so(verb: str, tmp_path: Path) -> None:
    """Every GPT-2 adapter of PEFT is of such layers: without fan_in_fan_out the folder would mean the transpose."""
    torch.manual_seed(0)
    base = nn.Sequential(hf.pytorch_utils.Conv1D(48, 16), nn.GELU(), hf.pytorch_utils.Conv1D(48, 48))
    options = peft.LoraConfig(r=4, target_modules=["0", "2"], fan_in_fan_out=True)
    adapted = peft.get_peft_model(copy.deepcopy(base), options)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    for name in ("one", "two"):
        adapted.save_pretrained(tmp_path / name)
    one, two, out = (tmp_path / name for name in ("one", "two", "out"))
    verbs: dict[str, Callable[[], Any]] = {
        "resize": lambda: pk.resize(one, out, rank=4),
        "convert": lambda: pk.convert(one, out, "lora"),
        "combine": lambda: pk.combine({one: 0.5, two: 0.5}, out, method="svd", rank=4),
    }
    verbs[verb]()
    x = torch.randn(5, 16)
    before, expected = base(x), adapted.eval()(x)
    found = peft.PeftModel.from_pretrained(base, str(out)).eval()(x)
    assert (found - expected).norm() < 1e-4 * (expected - before).norm()
    with pytest.raises(ExportError, match="fan_in_fan_out"):
        pk.export(one, tmp_path / "exported", "peft")


def test_a_rescaled_file_reports_what_its_dtype_lost(tmp_path: Path) -> None:
    """In fp16 a tenth of a thousandth of a small factor is subnormal."""
    path, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    up, down = (exact(*shape, seed=i).half() * 0.01 for i, shape in enumerate(((64, 4), (4, 64))))
    write(path, {"a.lora_up.weight": up, "a.lora_down.weight": down})
    report = pk.rescale(path, 1e-4, out)
    written = load(out)["a.lora_up.weight"].double()
    lost = float((written - 1e-4 * up.double()).norm() / (1e-4 * up.double()).norm())
    assert report.error == pytest.approx(lost, rel=1e-6) and lost > 1e-3


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
