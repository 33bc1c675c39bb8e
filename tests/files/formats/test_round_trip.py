"""Export and load give the same adapter, for every adapter, and for files that hypothesis draws."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import ExportError
from peftkit.wrapping.installed import installed_adapters
from tests.support.cells import LAYERS, MIXED, TARGETS, exists, model_of, of_kinds, out, require_equal, truths, weights
from tests.support.files import State, keyed, write
from tests.support.foreign import HEAD, QKV, SD15_Q, XL_Q, delta_of, dora_file, factors
from tests.support.models import tree
from tests.support.readers import READERS
from tests.support.zoo import ADAPTERS

# -- there and back ----------------------------------------------------------------------------------------------------

TRIPS = [(a, t, layer) for a in ADAPTERS for layer in ("linear", "conv 3×3") if exists(a, layer) for t in TARGETS]


@pytest.mark.parametrize("adapter, target, layer", TRIPS)
def test_what_is_exported_is_imported_as_the_same_function(
    adapter: str, target: str, layer: str, tmp_path: Path
) -> None:
    """ΔW on the same base; and of what went out in its own structure also on another base, and at other strengths."""
    model, path = model_of(adapter, layer), out(tmp_path, target)
    (written,) = pk.export(model, path, target, family="sd15").weights
    name = LAYERS[layer].path
    fresh = tree({name: LAYERS[layer].make()})
    with torch.no_grad():
        fresh.get_submodule(name).weight.copy_(model.get_submodule(name).weight)  # type: ignore[arg-type,operator]
    assert pk.load(fresh, path).loaded == (name,)
    (theirs,) = installed_adapters(fresh, ["default"])
    (ours,) = installed_adapters(model, ["default"])
    linear = ours.adapter.linear
    strengths = (1.0,) if written.how != "exact" or not linear else (1.0, 0.4, -1.0)
    for strength in strengths:
        expected, found = (
            copy.deepcopy(at.adapter).double().eval()(at.base.double(), strength).dense().detach()
            for at in (ours, theirs)
        )
        allowed = 1e-6 * float(expected.norm() + (ours.base.norm() if ours.adapter.reads_base else 0.0))
        assert (found - expected).norm() <= allowed, strength


@pytest.mark.parametrize(
    "adapter, target",
    [(a, t) for a in ADAPTERS for t in (TARGETS if a in ("lora", "dora") else ("a1111", "lycoris", "peft"))],
)
def test_a_native_file_is_exported_as_its_model_is(adapter: str, target: str, tmp_path: Path) -> None:
    """With the base; and without, unless ΔW must be made of it, which is said."""
    layer = next(layer for layer in LAYERS if exists(adapter, layer))
    model = model_of(adapter, layer)
    native = pk.save(model, tmp_path / "native.safetensors", portable=True)
    base = tree({LAYERS[layer].path: LAYERS[layer].make()})
    base.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapters." not in k})
    direct = pk.export(model, out(tmp_path, target, "direct"), target, family="sd15")
    report = pk.export(native, out(tmp_path, target, "based"), target, family="sd15", base=base)
    assert [(w.weight, w.how, w.structure) for w in report.weights] == [
        (w.weight, w.how, w.structure) for w in direct.weights
    ]
    read = READERS[target](out(tmp_path, target, "based"), weights(model), "sd15", 1.0)
    require_equal(read, truths(model))
    if any(w.how == "baked" for w in direct.weights):
        with pytest.raises(ExportError, match="base"):
            pk.export(native, out(tmp_path, target, "baseless"), target, family="sd15")
        assert not out(tmp_path, target, "baseless").exists()
    else:
        pk.export(native, out(tmp_path, target, "baseless"), target, family="sd15")
        read = READERS[target](out(tmp_path, target, "baseless"), weights(model), "sd15", 1.0)
        require_equal(read, truths(model))


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, nn.Module, nn.Module]]:
    """A program's file of every structure it has, the model it is of, and its base."""
    model, base, folder = of_kinds(MIXED), of_kinds(MIXED), tmp_path_factory.mktemp("sources")
    pk.unwrap(base)

    def file(source: str) -> tuple[Path, nn.Module, nn.Module]:
        path = out(folder, source, source)
        if not path.exists():
            pk.export(model, path, source, family="sd15")
        return path, model, base

    return file


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", TARGETS)
def test_a_file_of_one_program_is_exported_to_another(
    source: str, target: str, mixed_file: Callable[[str], tuple[Path, nn.Module, nn.Module]], tmp_path: Path
) -> None:
    """A file of every structure the source has, against the base it was made for."""
    file, model, base = mixed_file(source)
    pk.export(file, out(tmp_path, target, "out"), target, family="sd15", base=base)
    read = READERS[target](out(tmp_path, target, "out"), weights(model), "sd15", 1.0)
    require_equal(read, truths(model))


FOREIGN = {
    f"lora_unet_{SD15_Q.replace('.', '_')}": ("sd15", f"unet.{SD15_Q}", 320, 320),
    f"lycoris_{SD15_Q.replace('.', '_')}": ("sd15", f"unet.{SD15_Q}", 320, 320),
    f"unet.{SD15_Q}": ("sd15", f"unet.{SD15_Q}", 320, 320),
    f"base_model.model.{SD15_Q}": ("sd15", f"unet.{SD15_Q}", 320, 320),
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": ("sdxl", f"unet.{XL_Q}", 640, 2048),
    "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k": ("sdxl", f"unet.{XL_Q}", 640, 2048),
    "lora_te1_text_model_encoder_layers_3_self_attn_q_proj": (
        "sdxl",
        "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
        768,
        768,
    ),
    "lora_transformer_transformer_blocks_2_attn_to_add_out": (
        "sd3",
        "transformer.transformer_blocks.2.attn.to_add_out",
        1536,
        1536,
    ),
    "diffusion_model.vector_in.in_layer": ("flux", "transformer.time_text_embed.text_embedder.linear_1", 3072, 768),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_of_a_known_family_needs_no_base(name: str, target: str, tmp_path: Path) -> None:
    """Its names and shapes say which model it is for."""
    family, canonical, rows, columns = FOREIGN[name]
    up, down = torch.randn(rows, 2), torch.randn(2, columns)
    tensors = keyed(name, {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(4.0)})
    source = write(tmp_path / "foreign.safetensors", tensors)
    if target == "a1111" and family in ("sd3", "flux"):
        with pytest.raises(ExportError, match="A1111"):
            pk.export(source, out(tmp_path, target), target)
        return
    pk.export(source, out(tmp_path, target), target)
    component, _, path = canonical.partition(".")
    alone = target in ("lycoris", "peft") and component == "text_encoder"
    base = {path if alone else canonical: torch.zeros(rows, columns)}
    read = READERS[target](out(tmp_path, target), base, None if alone else family, 1.0)
    assert read.ignored == []
    (delta,) = read.deltas.values()
    assert (delta - 2 * up.double() @ down.double()).norm() <= 1e-6 * delta.norm()


@pytest.mark.parametrize("target", ["kohya", "comfyui", "diffusers"])
def test_a_fused_foreign_file_is_exported_by_the_layers_it_is_of(target: str, tmp_path: Path) -> None:
    """qkv of sd-scripts' SD 3 is one module there, and three in diffusers."""
    up, down = torch.randn(4608, 2), torch.randn(2, 1536)
    file = keyed("lora_unet_joint_blocks_2_x_block_attn_qkv", {"lora_up.weight": up, "lora_down.weight": down})
    source = write(tmp_path / "foreign.safetensors", file)
    base = {f"transformer.{path}": torch.zeros(()).expand(1536, 1536) for path in QKV}
    try:
        pk.export(source, tmp_path / "out.safetensors", target, family="sd3")
    except ExportError:
        assert target != "kohya", "the names are its own"
        return
    read = READERS[target](tmp_path / "out.safetensors", base, "sd3", 1.0)
    assert read.ignored == []
    for path, rows in zip(QKV, up.split(1536), strict=True):
        expected = rows.double() @ down.double()
        assert (read.deltas[f"transformer.{path}"] - expected).norm() <= 1e-6 * expected.norm()


def test_vectors_are_not_dropped_in_silence_by_an_export(tmp_path: Path) -> None:
    file = {**keyed("lora_unet_heads_0", HEAD), "lora_unet_heads_0.diff_b": torch.ones(24)}
    with pytest.raises(ExportError, match="bias"):
        pk.export(write(tmp_path / "a.safetensors", file), tmp_path / "b.safetensors", "comfyui")


# -- drawn -------------------------------------------------------------------------------------------------------------

SIZES = st.integers(1, 9)
RANKS = st.integers(1, 5)
SCALES = st.one_of(st.none(), st.floats(0.0625, 16, width=32))
KERNEL = st.sampled_from([(), (1,), (3,), (1, 1), (3, 3), (1, 3), (2, 2), (1, 1, 1), (2, 1, 3)])
#: LyCORIS and PEFT make a Tucker core for a kernel larger than 1 only
TUCKER_KERNEL = st.sampled_from([(3,), (3, 3), (1, 3), (2, 2), (2, 1, 3)])
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
drawn = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def imported(
    tensors: State, alpha: float | None, rows: int, channels: int, kernel: tuple[int, ...], at: Path
) -> Tensor:
    """ΔW (m, n) of a file on a fresh layer of that shape."""
    layer = CONVOLUTIONS[len(kernel)](channels, rows, kernel) if kernel else nn.Linear(channels, rows)
    model = nn.ModuleDict({"a": nn.ModuleDict({"layer": layer})})
    file = keyed("lora_unet_a_layer", tensors | ({} if alpha is None else {"alpha": torch.tensor(alpha)}))
    pk.load(model, write(at / "drawn.safetensors", file))
    return delta_of(model, "a.layer")


def require_close(found: Tensor, expected: Tensor, size: Tensor) -> None:
    """To 1e-6 of the sum of the absolute terms, which is what fp32 factors say their product to."""
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-6 * size.norm()


@given(rows=SIZES, channels=SIZES, rank=RANKS, alpha=SCALES, kernel=KERNEL, seed=st.integers(0, 99))
@drawn
def test_any_lora_is_its_product(
    rows: int, channels: int, rank: int, alpha: float | None, kernel: tuple[int, ...], seed: int, tmp_path: Path
) -> None:
    torch.manual_seed(seed)
    up, down = factors(rows, channels, kernel, rank)
    found = imported({"lora_up.weight": up, "lora_down.weight": down}, alpha, rows, channels, kernel, tmp_path)
    scale = 1.0 if alpha is None else torch.tensor(alpha).item() / rank
    B, A = up.flatten(1).double(), down.flatten(1).double()
    require_close(found, scale * B @ A, scale * B.abs() @ A.abs())


@given(rows=SIZES, channels=SIZES, rank=RANKS, alpha=SCALES, kernel=TUCKER_KERNEL, seed=st.integers(0, 99))
@drawn
def test_any_tucker_lora_is_its_contraction(
    rows: int, channels: int, rank: int, alpha: float | None, kernel: tuple[int, ...], seed: int, tmp_path: Path
) -> None:
    """ΔW[o, i, k] = Σ up[o, m]·mid[m, n, k]·down[n, i]."""
    torch.manual_seed(seed)
    ones = (1,) * len(kernel)
    up, mid, down = torch.randn(rows, rank), torch.randn(rank, rank, *kernel), torch.randn(rank, channels)
    file = {
        "lora_up.weight": up.reshape(rows, rank, *ones),
        "lora_mid.weight": mid,
        "lora_down.weight": down.reshape(rank, channels, *ones),
    }
    found = imported(file, alpha, rows, channels, kernel, tmp_path)
    scale = 1.0 if alpha is None else torch.tensor(alpha).item() / rank

    def contracted(up: Tensor, mid: Tensor, down: Tensor) -> Tensor:
        return scale * torch.einsum("om,mnk,ni->oik", up, mid.flatten(2), down).flatten(1)

    parts = [part.double() for part in (up, mid, down)]
    require_close(found, contracted(*parts), contracted(*(part.abs() for part in parts)))


CORES = st.one_of(st.tuples(st.just(False), KERNEL), st.tuples(st.just(True), TUCKER_KERNEL))


@given(rows=SIZES, channels=SIZES, rank=RANKS, alpha=SCALES, core=CORES, seed=st.integers(0, 99))
@drawn
def test_any_loha_is_its_product(
    rows: int,
    channels: int,
    rank: int,
    alpha: float | None,
    core: tuple[bool, tuple[int, ...]],
    seed: int,
    tmp_path: Path,
) -> None:
    torch.manual_seed(seed)
    tucker, kernel = core
    positions = torch.Size(kernel).numel()
    file: State = {}
    expected, size = torch.ones((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for half in "12":
        a = torch.randn(rank, rows) if tucker else torch.randn(rows, rank)
        b = torch.randn(rank, channels if tucker else channels * positions)
        file |= {f"hada_w{half}_a": a, f"hada_w{half}_b": b}
        factor = [a.double(), b.double()]
        if tucker:
            file[f"hada_t{half}"] = torch.randn(rank, rank, *kernel)
            factor.append(file[f"hada_t{half}"].flatten(2).double())
            form = "po,qi,pqk->oik"
        else:
            form = "or,rn->on"
        expected = expected * torch.einsum(form, *factor).flatten(1)
        size = size * torch.einsum(form, *(part.abs() for part in factor)).flatten(1)
    found = imported(file, alpha, rows, channels, kernel, tmp_path)
    scale = 1.0 if alpha is None else torch.tensor(alpha).item() / rank
    require_close(found, scale * expected, scale * size)


@given(
    outer=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    inner=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    first=st.one_of(st.none(), RANKS),
    second=st.one_of(st.none(), RANKS),
    core=CORES,
    alpha=SCALES,
    seed=st.integers(0, 99),
)
@drawn
def test_any_lokr_is_its_kronecker_product(
    outer: tuple[int, int],
    inner: tuple[int, int],
    first: int | None,
    second: int | None,
    core: tuple[bool, tuple[int, ...]],
    alpha: float | None,
    seed: int,
    tmp_path: Path,
) -> None:
    """first, second: the ranks of w1 and w2, None where they are whole. The scale divides by w2's where it has one."""
    torch.manual_seed(seed)
    tucker, kernel = core[0] and second is not None, core[1]
    positions = torch.Size(kernel).numel()
    file: State = {}
    if first is None:
        file["lokr_w1"] = w1 = torch.randn(*outer)
    else:
        file["lokr_w1_a"], file["lokr_w1_b"] = torch.randn(outer[0], first), torch.randn(first, outer[1])
        w1 = file["lokr_w1_a"].double() @ file["lokr_w1_b"].double()
    if second is None:
        file["lokr_w2"] = torch.randn(*inner, *kernel)
        w2 = file["lokr_w2"].flatten(1)
    elif tucker:
        file["lokr_t2"] = torch.randn(second, second, *kernel)
        file["lokr_w2_a"], file["lokr_w2_b"] = torch.randn(second, inner[0]), torch.randn(second, inner[1])
        parts = [file[f"lokr_{name}"].double() for name in ("w2_a", "w2_b", "t2")]
        w2 = torch.einsum("po,qi,pqk->oik", *parts[:2], parts[2].flatten(2)).flatten(1)
    else:
        file["lokr_w2_a"] = torch.randn(inner[0], second)
        file["lokr_w2_b"] = torch.randn(second, inner[1] * positions)
        w2 = file["lokr_w2_a"].double() @ file["lokr_w2_b"].double()
    rank = second or first
    scale = 1.0 if rank is None or alpha is None else torch.tensor(alpha).item() / rank
    expected = scale * torch.kron(w1.double(), w2.double())
    rows, channels = outer[0] * inner[0], outer[1] * inner[1]
    found = imported(file, alpha, rows, channels, kernel, tmp_path)
    terms = max(1, first or 1) * max(1, second or 1) ** (2 if tucker else 1)
    require_close(found, expected, terms * 4 * expected.abs().max() * torch.ones(expected.shape))


@given(rows=st.integers(2, 12), columns=st.integers(1, 9), axis=st.sampled_from(["out", "in"]), seed=st.integers(0, 99))
@drawn
def test_any_dora_is_its_decomposition(rows: int, columns: int, axis: str, seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"layer": nn.Linear(columns, rows)})
    tensors, expected = dora_file(model["layer"], axis, (rows, 1) if axis == "out" else (1, columns))
    W: Any = model["layer"].weight
    pk.load(model, write(tmp_path / "a.safetensors", keyed("lycoris_layer", tensors)))
    whole = W.detach().double() + (tensors["lora_up.weight"] @ tensors["lora_down.weight"]).double()
    assert (delta_of(model, "layer") - expected).norm() <= 1e-5 * (expected.norm() + W.norm() + whole.norm())
