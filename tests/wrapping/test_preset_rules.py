"""A preset of LyCORIS puts the same algorithms, sizes and ranks on the same modules as LyCORIS' own network does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.config import PRESET
from lycoris.kohya import LycorisNetworkKohya
from lycoris.kohya import create_network as create_theirs
from lycoris.wrapper import LycorisNetwork, create_lycoris, network_module_dict
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import FileError, OptionError, TargetError
from peftkit.integrations import kohya
from peftkit.wrapping.preset import builtin_presets, read_preset
from peftkit.wrapping.preset_options import algorithms
from tests.support.real import UNet2DConditionModel, clip_text_model, sd15_unet, stable_diffusion


@functools.cache
def sdxl_unet() -> nn.Module:
    """The U-Net of SDXL, every sort of module of it, eight channels wide."""
    return UNet2DConditionModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=2,
        norm_num_groups=2,
        cross_attention_dim=8,
        sample_size=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


UNETS: dict[str, Callable[[], nn.Module]] = {"SD 1.5": functools.cache(sd15_unet), "SDXL": sdxl_unet}
KINDS = {
    "LoConModule": "lora",
    "LohaModule": "loha",
    "LokrModule": "lokr",
    "GLoRAModule": "glora",
    "DyLoraModule": "dylora",
    "FullModule": "full",
    "DiagOFTModule": "oft",
    "ButterflyOFTModule": "boft",
    "IA3Module": "ia3",
    "TLoraModule": "t-lora",
}
RANKED = ("lora", "loha", "glora", "dylora", "t-lora")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """LyCORIS keeps on its classes what the last preset said."""
    for network in (LycorisNetwork, LycorisNetworkKohya):
        for name, value in [*vars(network).items()]:
            if name.isupper():
                monkeypatch.setattr(network, name, value)


Modules = dict[str, tuple[str, int, float | None]]


def theirs(network: Any, **roots: nn.Module) -> Modules:
    """Module -> kind, how many numbers are trained but for biases, and γ."""
    paths = {
        id(module): f"{part}.{name}" if part != "model" else name
        for part, root in roots.items()
        for name, module in root.named_modules()
    }
    found: Modules = {}
    for lora in network.loras:
        kind, size = KINDS[type(lora).__name__], sum(p.numel() for p in lora.parameters())
        if kind in ("oft", "boft"):  # whole blocks, of which the half above the diagonal counts
            blocks, b = lora.oft_blocks, lora.oft_blocks.shape[-1]
            size += blocks.numel() // (b * b) * (b * (b - 1) // 2) - blocks.numel()
        if kind == "full" and lora.bias is not None:
            size -= lora.bias.numel()
        ranked = kind in RANKED
        found[paths[id(lora.org_module[0])]] = kind, size, round(float(lora.scale), 6) if ranked else None
    return found


def ours(model: Any, rules: list[pk.Rule]) -> Modules:
    found: Modules = {}
    for entry in pk.plan(model, rules=rules).entries:
        rank, alpha = entry.options.get("rank", 1), entry.options.get("alpha", 1.0)
        scale = alpha / (rank**0.5 if entry.options.get("rslora") else rank)
        ranked = entry.kind in RANKED
        found[entry.site.name] = entry.kind, entry.parameters, round(scale, 6) if ranked else None
    return found


def test_every_algorithm_of_lycoris_is_a_kind_here() -> None:
    assert algorithms().keys() == network_module_dict.keys()


def without_repeats(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out names of layers that are inside a class of the same list: LyCORIS ends at a layer it has made twice."""
    names = [name for name in PRESET[preset]["unet_target_name"] if not name.startswith("time_embedding")]
    monkeypatch.setitem(PRESET, preset, {**PRESET[preset], "unet_target_name": names})


def test_the_presets_by_name_are_those_of_lycoris() -> None:
    assert {name: {**read_preset(name).keys} for name in builtin_presets()} == PRESET


SIZES = {"rank": 2, "alpha": 1.0, "conv_rank": 3, "conv_alpha": 0.5}


@pytest.mark.parametrize("unet", UNETS)
@pytest.mark.parametrize("preset", PRESET)
def test_every_preset_of_lycoris(preset: str, unet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_repeats(preset, monkeypatch)
    model, text = UNETS[unet](), clip_text_model()
    sizes = {"conv_dim": 3, "conv_alpha": 0.5}
    algorithm = "ia3" if preset == "ia3" else "lora"
    network = create_theirs(1.0, 2, 1.0, None, text, model, False, preset=preset, algo=algorithm, **sizes)
    expected = theirs(network, unet=model, text_encoder=text)
    parts = nn.ModuleDict({"unet": model, "text_encoder": text})
    if not expected:  # their regular expressions match from the beginning of a name, and no name begins so
        with pytest.raises(TargetError, match="'ia3' adapts no layer"):
            pk.preset_rules(parts, preset, algorithm)
        return
    found = ours(parts, pk.preset_rules(parts, preset, algorithm, **SIZES))
    assert found == expected
    alone = {name.removeprefix("unet."): said for name, said in found.items() if name.startswith("unet.")}
    if alone:
        assert ours(model, pk.preset_rules(model, preset, algorithm, **SIZES)) == alone
    if len(alone) < len(found):
        rest = ours(text, pk.preset_rules(text, preset, algorithm, part="text_encoder", **SIZES))
        assert {f"text_encoder.{name}" for name in rest} == found.keys() - {f"unet.{name}" for name in alone}


MAPS = r"""
enable_conv = false
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Upsample2D"]
unet_target_name = ["conv_in", "time_embedding\\..*"]
text_encoder_target_module = ["CLIPMLP"]
text_encoder_target_name = []
exclude_name = ["up_blocks\\.3", ".*to_v$"]

[module_algo_map.Attention]
algo = "lokr"
dim = 1
factor = 4
decompose_both = true

[module_algo_map.FeedForward]
dim = 3
alpha = 2
rs_lora = true

[module_algo_map.ResnetBlock2D]
algo = "loha"
dim = 2
use_tucker = true

[module_algo_map.Upsample2D]
algo = "lokr"
dim = 1
factor = 2
use_tucker = true
unbalanced_factorization = true

[module_algo_map.CLIPMLP]
algo = "diag-oft"
dim = 4
constraint = 0.01
rescaled = true

[name_algo_map.conv_in]
algo = "full"
dim = 1

[name_algo_map."time_embedding.linear_1"]
algo = "boft"
dim = 8

[name_algo_map."time_embedding.*"]
weight_decompose = true
wd_on_out = false
"""


def test_a_preset_with_maps_of_classes_and_names(tmp_path: Path) -> None:
    path = tmp_path / "preset.toml"
    path.write_text(MAPS)
    model, text = UNETS["SD 1.5"](), clip_text_model()
    network = create_theirs(1.0, 4, 1.0, None, text, model, False, preset=str(path), algo="locon")
    expected = theirs(network, unet=model, text_encoder=text)
    parts = nn.ModuleDict({"unet": model, "text_encoder": text})
    rules = pk.preset_rules(parts, path, "locon", rank=4, alpha=1.0)
    found = ours(parts, rules)
    assert {kind for kind, *_ in found.values()} == {"lora", "loha", "lokr", "oft", "boft", "full"}
    assert found == expected
    options = {name: rule.options for rule in rules for name in rule.targets}
    assert options["unet.time_embedding.linear_2"] == {"rank": 4, "alpha": 1.0, "decompose": True, "axis": "in"}
    assert next(own["constraint"] for name, own in options.items() if name.endswith("layers.0.mlp.fc1")) == 0.01


GLOBS = """
target_module = ["Linear"]
target_name = ["down_blocks.*.conv2"]
use_fnmatch = true
exclude_name = ["*.attn1.*"]
lora_prefix = "lycoris"

[module_algo_map.Attention]
algo = "glora"

[name_algo_map."time_embedding.*"]
algo = "tlora"
dim = 3
sig_type = "last"
use_data_init = false

[name_algo_map."*.ff.net.2"]
algo = "dylora"
dim = 6
block_size = 3
"""


def test_a_preset_of_a_single_model(tmp_path: Path) -> None:
    """Where maps are targets too, and names are globs."""
    path = tmp_path / "preset.toml"
    path.write_text(GLOBS)
    model = UNETS["SDXL"]()
    network = create_lycoris(model, 1.0, 2, 1.0, False, preset=str(path), algo="loha", block_size=2)
    found = ours(model, pk.preset_rules(model, path, "loha", rank=2, alpha=1.0))
    assert {kind for kind, *_ in found.values()} == {"loha", "glora", "dylora", "t-lora"}
    assert found == theirs(network, model=model)
    with pytest.raises(FileError, match="target_module and target_name are of a single model"):
        pk.preset_rules(stable_diffusion(), path)


def test_rules_of_a_pipeline_are_installed_and_train() -> None:
    pipe = stable_diffusion()
    plan = pk.wrap(pipe, rules=pk.preset_rules(pipe, "attn-mlp", "loha", rank=2))
    assert {name.partition(".")[0] for name in plan.modules} == {"unet", "text_encoder"}
    states = pipe.text_encoder(torch.tensor([[0, 3, 7, 1]])).last_hidden_state
    y: Tensor = pipe.unet(torch.randn(1, 4, 8, 8), torch.tensor([7]), states).sample
    y.square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in pk.adapter_parameters(pipe))


def test_sd_scripts_take_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_repeats("full", monkeypatch)
    model, text = sd15_unet(), clip_text_model()
    network = kohya.create_network(1.0, 4, 1.0, None, text, model, preset="full", algo="lora", conv_dim="2")
    network.apply_to(text, model)
    plain, plain_text = UNETS["SD 1.5"](), clip_text_model()
    their = create_theirs(1.0, 4, 1.0, None, plain_text, plain, False, preset="full", algo="lora", conv_dim="2")
    expected = {lora.lora_name: sum(p.numel() for p in lora.parameters()) for lora in their.loras}
    found = {name: sum(p.numel() for p in own.parameters()) for name, own in network.adapters.items()}
    assert {name.replace("text_model_", ""): size for name, size in found.items()} == expected
    (tmp_path / "a.toml").write_text(
        'unet_target_module = ["FeedForward"]\n[module_algo_map.FeedForward]\nalgo = "ia3"'
    )
    other = kohya.create_network(1.0, 4, 1.0, None, None, sd15_unet(), preset=str(tmp_path / "a.toml"))
    other.apply_to(None, None)
    assert {name for name, own in other.adapters.items() if "_ff_" not in name} == {
        f"lora_unet_{name}" for name in ("conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2")
    }
    assert {own.kind for name, own in other.adapters.items() if "_ff_" in name} == {"ia3"}
    with pytest.raises(OptionError, match="preset and targets"):
        kohya.create_network(1.0, 4, 1.0, None, None, sd15_unet(), preset="full", targets="x").apply_to(None, None)


@pytest.mark.parametrize(
    "text, message",
    [
        ('unet_target_modul = ["A"]', r"unknown key 'unet_target_modul'.*unet_target_module,.*Did you mean"),
        ('enable_conv = "yes"', "enable_conv = 'yes', and true or false was expected"),
        ("target_name = [1]", "a list of names was expected"),
        ('target_name = ["("]', "is not a regular expression"),
        ("target_name = [", "is not a TOML file"),
        ('lora_prefix = "mine"', "lora_prefix = 'mine'"),
        ('module_algo_map = ["Linear"]', "a table for each class"),
        ('[module_algo_map.Linear]\nalgo = "xlora"', r"module_algo_map\.Linear: algo = 'xlora': one of .*lora, locon,"),
        (
            "[module_algo_map.Linear]\nfactr = 2",
            r"module_algo_map\.Linear: unknown option 'factr'.*Did you mean 'factor'",
        ),
        ("[module_algo_map.Linear]\nfactor = 2", r"module_algo_map\.Linear: lora: it has no option 'factor'"),
        ('[module_algo_map.Linear]\nalgo = "full"\nalpha = 2', "full: it has no option 'alpha'"),
        ('[module_algo_map.Linear]\ndim = "4"', "dim = '4': an integer"),
        ("[module_algo_map.Linear]\nbypass_mode = true", r"bypass_mode = True: a route is chosen"),
    ],
)
def test_what_no_preset_has_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "preset.toml"
    path.write_text(text)
    with pytest.raises(FileError, match=message) as raised:
        pk.preset_rules(nn.Sequential(nn.Linear(8, 8)), path, part="model")
    assert str(path) in str(raised.value)


def test_a_name_that_is_no_preset_and_sizes_that_nothing_has() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(FileError, match=r"attn-mpl: a preset's name .*full-lin.*Did you mean 'attn-mlp'"):
        pk.preset_rules(model, "attn-mpl")
    with pytest.raises(OptionError, match=r"rank=4 was given, no rank, as full has none, was expected"):
        pk.preset_rules(model, "full", "full", part="model", rank=4)
    with pytest.raises(TargetError, match="adapts no layer of this Sequential"):
        pk.preset_rules(model, "attn-mlp")
    with pytest.raises(TargetError, match=r"It is a preset of LyCORIS: give rules=pk.preset_rules\(model, 'unet-only'"):
        pk.plan(model, "lora", targets="unet-only")
