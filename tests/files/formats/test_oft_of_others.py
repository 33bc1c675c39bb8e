"""OFT as PEFT, sd-scripts and LyCORIS write it, each by what the program itself computes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lycoris.modules.diag_oft import DiagOFTModule
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import FileError, MergedFormWarning
from tests.support.cells import require_same_forward
from tests.support.files import write
from tests.support.zoo import train


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def trained_by_peft(model: nn.Module, path: Path, **options: Any) -> nn.Module:
    """A folder of PEFT's OFT on every linear layer, and PEFT's model."""
    config = peft.OFTConfig(oft_block_size=4, target_modules="all-linear", init_weights=False, **options)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    for name, parameter in theirs.named_parameters():
        if "oft_R" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(str(path))
    return theirs.eval()


@pytest.mark.parametrize("terms", [2, 3, 4, 5, 7, None])
@torch.no_grad()
def test_the_series_of_peft_is_read_as_peft_computes_it_and_goes_back(terms: int | None, tmp_path: Path) -> None:
    base, x = net(), torch.randn(3, 8)
    options = {"use_cayley_neumann": False} if terms is None else {"num_cayley_neumann_terms": terms}
    theirs = trained_by_peft(base, tmp_path / "peft", **options)
    ours = copy.deepcopy(base)
    pk.load(ours, tmp_path / "peft")
    require_same_forward(ours(x), theirs(x), base(x))
    report = pk.export(ours, tmp_path / "back", "peft")
    assert {w.how for w in report.weights} == {"exact"}
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "back")).eval()
    require_same_forward(ours(x), back(x), base(x))


@pytest.mark.parametrize("terms, how", [(2, "exact"), (3, "baked"), (4, "exact")])
@torch.no_grad()
def test_a_series_that_peft_does_not_have_is_baked_for_it(terms: int, how: str, tmp_path: Path) -> None:
    base, x = net(), torch.randn(3, 8)
    model = copy.deepcopy(base)
    pk.wrap(model, "oft", targets="full", block_size=4, side="in", terms=terms)
    train(model, size=0.3)
    report = pk.export(model, tmp_path / "adapter", "peft")
    assert {w.how for w in report.weights} == {how}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).eval()
    require_same_forward(model(x), theirs(x), base(x))


def test_a_series_of_one_term_is_refused(tmp_path: Path) -> None:
    trained_by_peft(net(), tmp_path / "peft", num_cayley_neumann_terms=1)
    with pytest.raises(FileError, match="num_cayley_neumann_terms is 1"):
        pk.load(net(), tmp_path / "peft")


@pytest.mark.parametrize("kernel", [1, 3])
@torch.no_grad()
def test_on_a_kernel_pefts_merge_is_meant_and_said(kernel: int, tmp_path: Path) -> None:
    """PEFT's forward folds overlapping patches there, and differs from its own merge."""
    torch.manual_seed(1)
    base, x = nn.Sequential(nn.Conv2d(4, 8, kernel)), torch.randn(1, 4, 5, 5)
    config = peft.OFTConfig(oft_block_size=4, target_modules=["0"], init_weights=False)
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(str(tmp_path / "peft"))
    unmerged, merged = theirs(x), theirs.merge_and_unload()(x)
    ours = copy.deepcopy(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pk.load(ours, tmp_path / "peft")
    told = [w for w in caught if issubclass(w.category, MergedFormWarning)]
    assert bool(told) == (kernel > 1)
    assert torch.allclose(ours(x), merged, atol=1e-5)
    assert torch.allclose(unmerged, merged, atol=1e-4) == (kernel == 1)


WIDTH, BLOCKS = 3072, 128


def turned(weight: Tensor, blocks: Tensor, alpha: float) -> Tensor:
    """sd-scripts' OFT of the rows of one part, in float64: the norm is bounded by alpha times the rows."""
    Q = (blocks - blocks.mT).double()
    norm = Q.norm()
    Q = Q * ((norm.clamp(max=alpha * len(weight)) + 1e-8) / (norm + 1e-8))
    eye = torch.eye(Q.shape[-1], dtype=torch.float64)
    R = (eye + Q) @ torch.linalg.inv(eye - Q)
    rows = weight.double().unflatten(0, (len(blocks), -1))
    return torch.einsum("knm,knp->kmp", R, rows).flatten(0, 1)


@pytest.mark.parametrize("alpha", [1.0, 1e-3])
@torch.no_grad()
def test_sd_scripts_oft_of_flux_has_blocks_for_each_part_of_a_layer(alpha: float, tmp_path: Path) -> None:
    torch.manual_seed(2)
    modules = {
        "double_blocks_0_img_attn_qkv": {f"transformer_blocks.0.attn.to_{p}": WIDTH for p in "qkv"},
        "double_blocks_0_img_mlp_2": {"transformer_blocks.0.ff.net.2": WIDTH},
        "single_blocks_1_linear1": {
            **{f"single_transformer_blocks.1.attn.to_{p}": WIDTH for p in "qkv"},
            "single_transformer_blocks.1.proj_mlp": 4 * WIDTH,
        },
    }
    tensors: dict[str, Tensor] = {}
    layers, expected = {}, {}
    for module, parts in modules.items():
        tensors[f"oft_unet_{module}.alpha"] = torch.tensor(alpha)
        for i, (path, rows) in enumerate(parts.items()):
            blocks = 0.1 * torch.randn(BLOCKS, rows // BLOCKS, rows // BLOCKS)
            tensors[f"oft_unet_{module}.oft_blocks.{i}"] = blocks
            layers[path] = nn.Linear(2, rows, bias=False)
            expected[path] = turned(layers[path].weight, blocks, alpha)
    file = write(tmp_path / "oft.safetensors", tensors)
    model = nn.Module()
    for path, layer in layers.items():
        parent: nn.Module = model
        for name in path.split(".")[:-1]:
            if not hasattr(parent, name):
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(path.rpartition(".")[2], layer)
    pk.load(model, file)
    pk.merge(model, backup=None)
    for path, weight in expected.items():
        assert (model.get_parameter(f"{path}.weight").double() - weight).norm() < 1e-5 * weight.norm(), path


@pytest.mark.parametrize(
    "keys, words",
    [
        (["double_blocks_0_img_attn_qkv.oft_blocks.0", "double_blocks_0_img_attn_qkv.oft_blocks.1"], "2 parts"),
        (["double_blocks_0_img_mlp_0.oft_blocks.1"], "not the blocks of one OFT"),
        (["x.oft_blocks.0", "x.oft_blocks.1", "x.oft_blocks.2"], "3 parts"),
    ],
)
def test_blocks_of_other_parts_are_refused_by_name(keys: list[str], words: str, tmp_path: Path) -> None:
    file = write(tmp_path / "oft.safetensors", {f"oft_unet_{key}": torch.zeros(4, 2, 2) for key in keys})
    with pytest.raises(FileError, match=words):
        pk.read(file)


@pytest.mark.parametrize("rescaled", [False, True])
@torch.no_grad()
def test_lycoris_blocks_of_one_row_rotate_nothing_and_the_other_layers_are_read(rescaled: bool, tmp_path: Path) -> None:
    """It makes them of a prime number of rows."""
    torch.manual_seed(3)
    base, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 7)), torch.randn(2, 6)
    tensors: dict[str, Tensor] = {}
    theirs = copy.deepcopy(base)
    for i in range(2):
        module = DiagOFTModule(f"lycoris_{i}", base[i], 1, lora_dim=4, rescaled=rescaled)
        nn.init.normal_(module.oft_blocks, std=0.3)
        if rescaled:
            nn.init.uniform_(module.rescale, 0.5, 1.5)
        tensors |= {f"lycoris_{i}.{key}": t for key, t in module.state_dict().items() if "org" not in key}
        theirs.get_submodule(str(i)).weight.copy_(module.get_merged_weight()[0])
    assert tensors["lycoris_1.oft_blocks"].shape == (7, 1, 1)
    file = write(tmp_path / "oft.safetensors", tensors)
    ours = copy.deepcopy(base)
    pk.load(ours, file)
    require_same_forward(ours(x), theirs(x), base(x))
