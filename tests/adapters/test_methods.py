"""Kinds whose factors come from elsewhere: each ΔW against its definition and PEFT's class."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapters import Adapter, registry
from peftkit.adapters.bank import bank
from peftkit.errors import OptionError
from peftkit.geometry import Shape
from tests.support.cells import TARGETS, cell
from tests.support.zoo import METHODS, make, target_of, train

M, N = 12, 10


def trained(kind: str, rows: int = M, columns: int = N, **options: Any) -> tuple[Adapter, Tensor, Tensor]:
    """An adapter with other numbers than at the start, its ΔW, and W."""
    torch.manual_seed(0)
    W = torch.randn(rows, columns, dtype=torch.float64)
    adapter = registry.build(kind, Shape(rows, columns), W, **options).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
        return adapter, adapter(W, 1.0).dense(), W


def numbers(adapter: Adapter) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in (*adapter.named_parameters(), *adapter.named_buffers())}


# -- definitions ------------------------------------------------------------------------------------------------------


def test_gates_scale_ranks() -> None:
    adapter, delta, _ = trained("svdlora", rank=3, alpha=1.5)
    own = numbers(adapter)
    assert torch.allclose(delta, 0.5 * own["up"] @ own["gate"].diag() @ own["down"])
    with torch.no_grad():
        adapter.get_parameter("gate")[1] = 0
    assert torch.linalg.matrix_rank(adapter(torch.zeros(M, N), 1.0).dense()) == 2


def test_blocks_are_on_the_diagonal_and_runs_are_summed() -> None:
    adapter, delta, _ = trained("melora", rank=2, blocks=2, alpha=1)
    own = numbers(adapter)
    expected = torch.zeros(M, N, dtype=torch.float64)
    for i in range(2):
        expected[6 * i : 6 * i + 6, 5 * i : 5 * i + 5] = 0.5 * own["up"][i] @ own["down"][i]
    assert torch.allclose(delta, expected)
    adapter, delta, _ = trained("block-lora", rank=3, blocks=2)
    own, x = numbers(adapter), torch.randn(N, dtype=torch.float64)
    assert torch.allclose(delta @ x, own["up"] @ (own["down"] @ (x[:5] + x[5:])))


@pytest.mark.parametrize("columns", [10, 12, 14])
def test_mora_sums_runs_and_tiles_outputs(columns: int) -> None:
    adapter, delta, _ = trained("mora", columns=columns, rank=1)
    core = numbers(adapter)["core"]
    k = len(core)
    assert k == int(math.sqrt(M + columns) + 0.5)
    runs = -(-columns // k)
    x = torch.randn(columns, dtype=torch.float64)
    whole = torch.cat((x, x[: runs * k - columns]))  # the last run goes on with the first inputs
    out = core @ whole.view(runs, k).sum(0)
    assert torch.allclose(delta @ x, out.repeat(-(-M // k))[:M])


@pytest.mark.parametrize("columns", [9, 12])
def test_mora_turns_runs_as_rotary_embeddings_do(columns: int) -> None:
    adapter, delta, _ = trained("mora", columns=columns, rank=1, mode="rope")
    core = numbers(adapter)["core"]
    k = len(core)
    runs = -(-columns // k)
    x = torch.randn(columns, dtype=torch.float64)
    out = []
    for t, run in enumerate(torch.cat((x, x[: runs * k - columns])).view(runs, k)):
        angle = t * 10000.0 ** -(torch.arange(k // 2, dtype=torch.float64) / (k // 2))
        pairs = torch.complex(run[: k // 2], run[k // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        out.append(core @ torch.cat((pairs.real, pairs.imag)))
    assert torch.allclose(delta @ x, torch.cat(out).repeat(-(-M // (runs * k)))[:M])


def test_a_layer_s_part_of_the_tables_is_its_own() -> None:
    """Another layer, larger or smaller, before or after, changes nothing; other seeds and roles do."""
    like = torch.zeros((), dtype=torch.float64)
    small = bank(11, "a", 5, 3, like).clone()
    assert torch.equal(bank(11, "a", 500, 3, like)[:5], small)
    assert not torch.equal(bank(11, "b", 5, 3, like), small)
    assert not torch.equal(bank(12, "a", 5, 3, like), small)
    table = bank(11, "a", 2000, 3, like)
    assert table.abs().max() <= 1 and abs(float(table.mean())) < 0.03 and abs(float(table.var()) - 1 / 3) < 0.02


def test_vera_scales_rows_of_frozen_factors() -> None:
    adapter, delta, _ = trained("vera", rank=7, seed=2)
    own = numbers(adapter)
    assert torch.allclose(delta, own["lambda_b"].diag() @ own["left"] @ own["lambda_d"].diag() @ own["right"])
    assert own["left"].abs().max() <= math.sqrt(6 / 7) and own["right"].abs().max() <= math.sqrt(6 / N)
    assert adapter.state_dict().keys() == {"lambda_b", "lambda_d"}


@pytest.mark.parametrize("columns", [8, 16])
def test_randlora_is_the_paper_s_sum(columns: int) -> None:
    adapter, delta, _ = trained("randlora", columns=columns, rank=3, alpha=1.5)
    own = numbers(adapter)
    expected = torch.zeros(max(M, columns), min(M, columns), dtype=torch.float64)
    for j, (scales, gains) in enumerate(zip(own["lambdas"], own["gammas"], strict=True)):
        basis = own["bases"][:, 3 * j : 3 * j + 3]
        expected += 0.5 * basis @ scales.diag() @ own["basis"] @ gains.diag()
    assert torch.allclose(delta, expected.mT if columns > M else expected)
    assert torch.linalg.matrix_rank(delta) == min(M, columns)
    assert adapter.state_dict().keys() == {"lambdas", "gammas"}


def test_lora_xs_trains_the_projection_of_the_full_gradient() -> None:
    torch.manual_seed(0)
    W, G = torch.randn(2, M, N, dtype=torch.float64)
    adapter = registry.build("lora-xs", Shape(M, N), W, rank=4)
    (adapter(W, 1.0).dense() * G).sum().backward()
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    expected = U[:, :4].mT @ G @ V[:4].mT * S[:4]
    signs = (numbers(adapter)["left"] * U[:, :4]).sum(0).sign()
    gradient = adapter.get_parameter("core").grad
    assert gradient is not None and torch.allclose(gradient, signs[:, None] * expected * signs)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_anchored_start_has_peft_s_factors_and_their_gradients(start: str) -> None:
    """On a base that no bit of changes, where PEFT's has moved."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(N, M))
    ours, weight = copy.deepcopy(net), net[0].weight.detach().clone()
    model: Any = peft.get_peft_model(
        net, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=start)
    )  # type: ignore[arg-type]
    layer = model.base_model.model[0]
    pk.wrap(ours, "anchored", rank=4, alpha=8, start=start)
    own = numbers(ours[0].adapters["default"])
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    assert torch.allclose(own["up0"] @ own["down0"], up @ down, atol=1e-5)
    assert torch.equal(ours[0].weight, weight) and not torch.equal(layer.base_layer.weight, weight)
    x, gradients = torch.linspace(-1, 1, 3 * N).view(3, N), []
    for each in (ours, model):
        each(x).square().sum().backward()
        gradients.append([p.grad for p in each.parameters() if p.grad is not None])
    signs = (own["up0"] * up).sum(0).sign()  # a pair of singular vectors has no sign of its own
    theirs_down, theirs_up = sorted(gradients[1], key=lambda g: g.shape[0] != 4)
    ours_down, ours_up = sorted(gradients[0], key=lambda g: g.shape[0] != 4)
    assert torch.allclose(ours_up, theirs_up * signs, atol=1e-4)
    assert torch.allclose(ours_down, theirs_down * signs[:, None], atol=1e-4)


def test_milora_starts_at_the_smallest_singular_values() -> None:
    adapter, _, W = trained("anchored", rank=3, alpha=6, start="milora")
    own = numbers(adapter)
    values = torch.linalg.svdvals(2 * own["up0"] @ own["down0"])
    assert torch.allclose(values[:3], torch.linalg.svdvals(W)[-3:])


def test_svdiff_moves_singular_values_and_none_below_zero() -> None:
    torch.manual_seed(0)
    W = torch.randn(M, N, dtype=torch.float64)
    adapter = registry.build("svdiff", Shape(M, N), W)
    S = torch.linalg.svdvals(W)
    shift = torch.linspace(-2 * float(S[-1]), 0.1, N, dtype=torch.float64).flip(0)
    with torch.no_grad():
        adapter.get_parameter("shift").copy_(shift)
        found = torch.linalg.svdvals(W + adapter(W, 1.0).dense())
    assert torch.allclose(found, (S + shift).clamp(min=0).sort(descending=True).values)


@pytest.mark.parametrize(("pattern", "columns"), [("banded", N), ("banded", 16), ("random", N), ("top", M)])
def test_svft_is_sparse_between_singular_vectors(pattern: str, columns: int) -> None:
    adapter, delta, W = trained("svft", columns=columns, pattern=pattern, off_diag=2)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    M_ = U.mT @ delta @ V.mT  # up to the signs of the pairs, which change no place
    size = min(M, columns)
    held = (M_.abs() > 1e-12).sum()
    assert held == len(adapter.get_parameter("entries")) == size * 5 - 6
    assert torch.allclose(U @ M_ @ V, delta)
    assert torch.allclose((delta * W).sum(), (M_.diagonal() * S).sum())
    assert torch.allclose(delta.square().sum(), adapter.get_parameter("entries").square().sum())
    outside = M_[~(M_.abs() > 1e-12)]
    if pattern == "banded":
        i = torch.arange(size)
        assert torch.equal(M_.abs() > 1e-12, (i - i[:, None]).abs() <= 2)
    if pattern == "top":
        angles = (U.mT @ V.mT).abs()
        assert angles[M_.abs() > 1e-12].min() >= angles[M_.abs() <= 1e-12].max()
    assert len(outside) == size * size - held


def test_svft_says_what_it_cannot_be() -> None:
    W = torch.zeros(M, N)
    with pytest.raises(OptionError, match="singular vectors of 12×10 differ in length"):
        registry.build("svft", Shape(M, N), W, pattern="top")
    with pytest.raises(OptionError, match="off_diag=10 was given, 0 to 9"):
        registry.build("svft", Shape(M, N), W, off_diag=10)
    with pytest.raises(OptionError, match="'banded', 'random' or 'top'"):
        registry.build("svft", Shape(M, N), W, pattern="plain")


@pytest.mark.parametrize("frequencies", [2, 30])
def test_fourierft_is_the_inverse_transform(frequencies: int) -> None:
    """As two factors, and by the transform itself."""
    adapter, delta, _ = trained("fourierft", frequencies=frequencies, scaling=40.0)
    own = numbers(adapter)
    spectrum = torch.zeros(M, N, dtype=torch.complex128)
    spectrum[tuple(own["indices"])] = own["spectrum"].to(torch.complex128)
    assert torch.allclose(delta, 40.0 * torch.fft.ifft2(spectrum).real)
    assert len({tuple(place) for place in own["indices"].mT.tolist()}) == frequencies


@pytest.mark.parametrize("frozen", [False, True])
def test_dylora_trains_prefixes_and_uses_one(frozen: bool) -> None:
    torch.manual_seed(0)
    W = torch.randn(M, N, dtype=torch.float64)
    adapter = registry.build("dylora", Shape(M, N), W, rank=8, alpha=4, block=2, frozen=frozen, prefix=4)
    with torch.no_grad():
        adapter.get_parameter("up").normal_()
    own = numbers(adapter)
    alone = registry.build("lora", Shape(M, N), W, rank=4, alpha=2)
    alone.load_state_dict({"up": own["up"][:, :4], "down": own["down"][:4]})
    assert torch.equal(adapter.eval()(W, 1.0).dense(), alone(W, 1.0).dense())
    adapter.train()
    for share, ranks in ((0.0, 2), (0.3, 4), (0.99, 8)):
        adapter.use_prefix(share)
        adapter.zero_grad()
        (adapter(W, 1.0).dense() * W).sum().backward()
        for gradient in (adapter.get_parameter("up").grad, adapter.get_parameter("down").grad.mT):  # type: ignore[union-attr]
            assert gradient is not None
            moved = gradient.abs().sum(0).nonzero().flatten().tolist()
            assert moved == list(range(ranks - 2 if frozen else 0, ranks))


@pytest.mark.parametrize("frozen", [False, True])
def test_dylora_draws_by_itself(frozen: bool) -> None:
    """Every prefix as often as another, each with the gradients of the same prefix said from outside."""
    torch.manual_seed(0)
    W = torch.randn(M, N, dtype=torch.float64)
    adapter = registry.build("dylora", Shape(M, N), W, rank=4, block=1, frozen=frozen)
    with torch.no_grad():
        adapter.get_parameter("up").normal_()

    def step() -> list[Tensor]:
        adapter.zero_grad()
        delta = adapter(W, 1.0).dense()
        (delta * W).sum().backward()
        return [delta.detach(), *(p.grad for p in adapter.parameters() if p.grad is not None)]

    said = {}
    for ranks in range(1, 5):
        adapter.use_prefix((ranks - 0.5) / 4)
        said[ranks] = step()
    adapter.drawn = None  # type: ignore[assignment]
    counts = dict.fromkeys(said, 0)
    for _ in range(200):
        found = step()
        (ranks,) = (k for k, each in said.items() if torch.allclose(each[0], found[0]))
        assert all(torch.allclose(own, other) for own, other in zip(found, said[ranks], strict=True))
        counts[ranks] += 1
    assert min(counts.values()) > 25


# -- PEFT's own classes -----------------------------------------------------------------------------------------------


def theirs(config: peft.PeftConfig, columns: int = N) -> tuple[Any, Any]:
    """A Linear (n → 12) with PEFT's adapter, moved from its start, and the module that holds it."""
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(columns, M)), config)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model, model.base_model.model[0]


def _agrees(model: Any, layer: Any, kind: str, options: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Our adapter with PEFT's numbers gives PEFT's outputs and PEFT's gradient of the input."""
    ours = nn.Sequential(copy.deepcopy(layer.base_layer))
    pk.wrap(ours, kind, **options)
    held = ours[0].adapters["default"].state_dict()
    assert held.keys() >= tensors.keys()
    with torch.no_grad():
        for name, tensor in tensors.items():
            held[name].copy_(tensor)
    results = []
    for net in (model.eval(), ours.eval()):
        x = torch.linspace(-1, 1, 3 * N).view(3, N).requires_grad_()
        y = net(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for own, other in zip(*results, strict=True):
        assert torch.allclose(own, other, atol=1e-5)


def test_adalora_is_peft_s() -> None:
    """Whose scale is α/(r + 1e-5)."""
    config = peft.AdaLoraConfig(init_r=4, lora_alpha=8, target_modules=["0"], total_step=10)
    model, layer = theirs(config)
    tensors = {"up": layer.lora_B["default"], "gate": layer.lora_E["default"][:, 0], "down": layer.lora_A["default"]}
    _agrees(model, layer, "svdlora", {"rank": 4, "alpha": 8}, tensors)


@pytest.mark.parametrize("mode", ["plain", "ragged", "mini", "bat"])
def test_miss_is_peft_s(mode: str) -> None:
    rank = {"plain": 5, "ragged": 4}.get(mode, 2)
    start: Any = {"mini": "mini", "bat": "bat"}.get(mode, True)
    config = peft.MissConfig(r=rank, mini_r=3, target_modules=["0"], init_weights=start)
    model, layer = theirs(config)
    options = {"rank": rank, **({"mini": 3} if mode == "mini" else {}), **({"bat": True} if mode == "bat" else {})}
    _agrees(model, layer, "miss", options, {"block": layer.miss_block["default"]})


def test_vera_is_peft_s_with_its_projections() -> None:
    model, layer = theirs(peft.VeraConfig(r=6, target_modules=["0"], d_initial=0.1))
    ours = nn.Sequential(copy.deepcopy(layer.base_layer))
    pk.wrap(ours, "vera", rank=6)
    adapter = ours[0].adapters["default"]
    with torch.no_grad():
        adapter.lambda_b.copy_(layer.vera_lambda_b["default"])
        adapter.lambda_d.copy_(layer.vera_lambda_d["default"])
        adapter.left.copy_(layer.vera_B["default"][:M])
        adapter.right.copy_(layer.vera_A["default"][:, :N])
    x = torch.linspace(-1, 1, 3 * N).view(3, N)
    assert torch.allclose(ours.eval()(x), model.eval()(x), atol=1e-5)


def test_fourierft_is_peft_s_at_the_same_places() -> None:
    config = peft.FourierFTConfig(n_frequency=20, scaling=40.0, target_modules=["0"], random_loc_seed=777)
    model, layer = theirs(config)
    tensors = {"spectrum": layer.fourierft_spectrum["default"]}
    _agrees(model, layer, "fourierft", {"frequencies": 20, "scaling": 40.0}, tensors)
    own = registry.build("fourierft", Shape(M, N), torch.zeros(M, N), frequencies=20)
    assert torch.equal(numbers(own)["indices"], layer.indices["default"])


@pytest.mark.parametrize(("columns", "rank"), [(N, 4), (N, 5), (17, 4), (M, 3)])
def test_randlora_in_peft_s_pairing_is_peft_s(columns: int, rank: int) -> None:
    model, layer = theirs(peft.RandLoraConfig(r=rank, target_modules=["0"], randlora_alpha=8), columns)
    ours = nn.Sequential(copy.deepcopy(layer.base_layer))
    pk.wrap(ours, "randlora", rank=rank, alpha=8, pairing="peft")
    adapter = ours[0].adapters["default"]
    long, short = sorted((M, columns), reverse=True)
    x = torch.linspace(-1, 1, 3 * columns).view(3, columns)
    start = layer.randlora_gamma["default"].new_tensor(1 / max(-(-short // rank), short))
    assert torch.allclose(adapter.gammas, start)
    with torch.no_grad():
        adapter.lambdas.copy_(layer.randlora_lambda["default"].mT)
        adapter.gammas.copy_(layer.randlora_gamma["default"])
        adapter.bases.copy_(layer.randlora_B["default"][:long].flatten(1))
        adapter.basis.copy_(layer.randlora_A["default"][:, 0])
        expected = layer.get_delta_weight("default")
        assert (adapter(layer.base_layer.weight, 1.0).dense() - expected).norm() <= 1e-6 * expected.norm()
    assert torch.allclose(ours.eval()(x), model.eval()(x), atol=1e-5)


def test_larger_layers_have_the_same_bases_in_peft_s_pairing() -> None:
    small, large = (
        registry.build("randlora", Shape(*s), torch.zeros(s), rank=4, pairing="peft") for s in ((10, 6), (9, 30))
    )
    bases, wide = (numbers(each)["bases"].unflatten(1, (-1, 4)) for each in (small, large))
    assert torch.equal(wide[:10, :2], bases) and torch.equal(numbers(large)["basis"][:, :6], numbers(small)["basis"])


def test_randlora_of_peft_is_another_sum() -> None:
    """PEFT pairs columns of the bases with other rows of the scales: the paper's sum is not what it computes."""
    _, layer = theirs(peft.RandLoraConfig(r=4, target_modules=["0"], randlora_alpha=8))
    bases, basis = layer.randlora_B["default"], layer.randlora_A["default"]
    lambdas, gammas = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    papers = sum(
        bases[:M, j] @ lambdas[:, j].diag() @ basis[:, 0, :N] @ gammas[j, :N].diag() for j in range(lambdas.shape[1])
    )
    delta = layer.get_delta_weight("default")
    assert (delta - 2 * papers).norm() > 0.5 * delta.norm()


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", METHODS)
def test_files_are_small_and_exact(case: str, tmp_path: Path) -> None:
    """Saved and loaded, a method is the same bit for bit; tables and singular vectors are not in the file."""
    module, x = make("linear", torch.float32)
    twin = copy.deepcopy(module)
    pk.wrap(module, METHODS[case].kind, targets=target_of(module), **METHODS[case].options)
    train(module)
    path = pk.save(module, tmp_path / "a.safetensors")
    pk.load(twin, path)
    assert torch.equal(twin(x), module(x))
    held = next(iter(module.adapters.values()))  # type: ignore[operator]
    stored = sum(p.numel() for p in held.parameters()) + (held.down.numel() if case == "lora-fa" else 0)
    own = {name: t for name, t in held.state_dict().items() if name not in held.derived()}
    assert sum(t.numel() for t in own.values() if t.is_floating_point()) == stored


PEFTS = ("svdlora", "sora", "miss", "vera", "randlora", "fourierft", "tiny-lora")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", METHODS)
def test_every_program_reads_them(case: str, target: str) -> None:
    """As a LoRA of the same ΔW; what reads its base, as ΔW on that base. PEFT has some of them on Linears."""
    for layer in ("linear", "conv 3×3"):
        own = target == "peft" and layer == "linear" and case.startswith(PEFTS)
        how = "exact" if own and case != "randlora" else "baked" if case == "miss bat" else "low rank"
        assert cell(case, target, layer).how == how
