"""What others wrote is read as they mean it: files of the real packages, every spelling, and files that mean nothing.

Of a package's own file the oracle is the package's forward, never its merge: LyCORIS merges LoHa and LoKr with α/r
applied twice. Files written by hand here follow FORMATS.md, and their ΔW is computed by hand too.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lycoris.kohya import create_network
from lycoris.wrapper import LycorisNetwork
from peft.utils import get_peft_model_state_dict
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftkit as pk
from peftkit.errors import AmbiguousFileError, ExportError, FileError, MismatchError, OptionError
from peftkit.wrapping.layer import installed_adapters
from tests.support.cells import (
    LAYERS,
    MIXED,
    NET_LAYERS,
    TARGETS,
    exists,
    model_of,
    net,
    of_kinds,
    out,
    require_equal,
    require_same_forward,
    tree,
    truths,
    weights,
)
from tests.support.readers import READERS
from tests.support.real import clip_text_model, sd15_unet, stable_diffusion
from tests.support.zoo import ADAPTERS

Tensors = dict[str, Tensor]


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file by the reference implementation."""
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def under(module: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}


def randomized(parameters: Iterator[tuple[str, Tensor]], size: float = 0.3) -> None:
    """Draw parameters that start at zero or at one anew, around where they start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


# -- LyCORIS -----------------------------------------------------------------------------------------------------------

KERNELS = ("stem", "block.down")
POINTWISE = ("block.point", "heads.0", "heads.1")
LOW: dict[str, Any] = {"lora_dim": 3, "alpha": 2}
KRON: dict[str, Any] = {"lora_dim": 1, "alpha": 2, "factor": 4}
#: What LyCORIS can train: algorithm, options, layers
LYCORIS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "LoCon": ("locon", LOW, NET_LAYERS),
    "LoCon of rank-stabilised scale": ("locon", {**LOW, "rs_lora": True}, NET_LAYERS),
    "LoCon with a scalar": ("locon", {**LOW, "use_scalar": True}, NET_LAYERS),
    "LoCon Tucker": ("locon", {**LOW, "use_tucker": True}, NET_LAYERS),
    "LoHa": ("loha", LOW, NET_LAYERS),
    "LoHa Tucker": ("loha", {**LOW, "use_tucker": True}, NET_LAYERS),
    "LoHa with a scalar": ("loha", {**LOW, "use_scalar": True}, NET_LAYERS),
    "LoKr": ("lokr", KRON, NET_LAYERS),
    "LoKr of two low-rank factors": ("lokr", {**KRON, "decompose_both": True}, NET_LAYERS),
    "LoKr full": ("lokr", {**KRON, "full_matrix": True}, NET_LAYERS),
    "LoKr Tucker": ("lokr", {**KRON, "use_tucker": True}, NET_LAYERS),
    "LoKr Tucker of two low-rank factors": ("lokr", {**KRON, "use_tucker": True, "decompose_both": True}, NET_LAYERS),
    "LoKr of an unbalanced split": ("lokr", {**KRON, "unbalanced_factorization": True}, NET_LAYERS),
    "LoKr with a scalar": ("lokr", {**KRON, "use_scalar": True}, NET_LAYERS),
    "LoKr of rank-stabilised scale": ("lokr", {**KRON, "lora_dim": 2, "factor": 2, "rs_lora": True}, POINTWISE),
    "DoRA per output": ("locon", {**LOW, "weight_decompose": True, "wd_on_out": True}, NET_LAYERS),
    "DoRA per input": ("locon", {**LOW, "weight_decompose": True, "wd_on_out": False}, NET_LAYERS),
    "DoRA Tucker": ("locon", {**LOW, "weight_decompose": True, "use_tucker": True}, NET_LAYERS),
    "DoRA of LoHa per output": ("loha", {**LOW, "weight_decompose": True}, NET_LAYERS),
    "DoRA of LoHa per input": ("loha", {**LOW, "weight_decompose": True, "wd_on_out": False}, NET_LAYERS),
    "DoRA of LoKr per output": ("lokr", {**KRON, "weight_decompose": True}, NET_LAYERS),
    "DoRA of LoKr per input": ("lokr", {**KRON, "weight_decompose": True, "wd_on_out": False}, NET_LAYERS),
    "OFT": ("diag-oft", {"lora_dim": 4, "alpha": 1}, NET_LAYERS),
    "OFT rescaled": ("diag-oft", {"lora_dim": 4, "alpha": 1, "rescaled": True}, NET_LAYERS),
    "OFT constrained": ("diag-oft", {"lora_dim": 4, "alpha": 1, "constraint": 0.02}, NET_LAYERS),
    "BOFT": ("boft", {"lora_dim": 12, "alpha": 1}, NET_LAYERS),
    "BOFT rescaled": ("boft", {"lora_dim": 12, "alpha": 1, "rescaled": True}, NET_LAYERS),
    "BOFT constrained": ("boft", {"lora_dim": 12, "alpha": 1, "constraint": 0.02}, NET_LAYERS),
    "full": ("full", {"lora_dim": 1, "alpha": 1}, ("heads.1",)),  # the one without a bias
    "GLoRA": ("glora", LOW, POINTWISE),
    "(IA)³ per output": ("ia3", {"lora_dim": 1, "alpha": 1}, NET_LAYERS),
    "(IA)³ per input": ("ia3", {"lora_dim": 1, "alpha": 1, "train_on_input": True}, NET_LAYERS),
}


def lycoris(algorithm: str, options: Mapping[str, Any], model: nn.Module, layers: tuple[str, ...]) -> LycorisNetwork:
    """LyCORIS' own network on these layers of a model, applied and with other parameters than it starts with."""
    LycorisNetwork.apply_preset(
        {"target_module": [], "target_name": [name.replace(".", r"\.") + "$" for name in layers]}
    )
    network = LycorisNetwork(model, network_module=algorithm, warn_on_unmatched=False, **options)
    assert len(network.loras) == len(layers)
    network.apply_to()
    randomized(network.named_parameters(), 0.05 if algorithm in ("diag-oft", "boft", "full") else 0.3)
    return network.eval()


def lycoris_file(label: str, folder: Path) -> tuple[Path, nn.Module, nn.Module, Tensor]:
    """A file LyCORIS wrote, the model it trained, the base, and an input."""
    algorithm, options, layers = LYCORIS[label]
    base, x = net()
    theirs = copy.deepcopy(base)
    network = lycoris(algorithm, {"conv_lora_dim": 4, "conv_alpha": 2, **options}, theirs, layers)
    network.save_weights(str(folder / "theirs.safetensors"), torch.float32, {})
    return folder / "theirs.safetensors", theirs, base, x


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_"])
@pytest.mark.parametrize("label", LYCORIS)
@torch.no_grad()
def test_a_file_of_lycoris_computes_what_lycoris_did(label: str, prefix: str, tmp_path: Path) -> None:
    """Under the names of its generic wrapper, and under kohya's."""
    path, theirs, base, x = lycoris_file(label, tmp_path)
    if prefix != "lycoris_":
        held = load_file(path)
        assert all(key.startswith("lycoris_") for key in held)
        write(path, {prefix + key.removeprefix("lycoris_"): tensor for key, tensor in held.items()})
    ours = copy.deepcopy(base)
    report = pk.load(ours, path)
    assert report.complete
    assert len(report.loaded) == len(LYCORIS[label][2])
    require_same_forward(ours(x), theirs(x), base(x))


@pytest.mark.parametrize(
    "algorithm, options, what",
    [
        ("glora", LOW, "kernel"),
        ("tlora", {"lora_dim": 2, "alpha": 1}, "lambda_layer"),
    ],
)
def test_what_is_not_read_of_lycoris_says_so(
    algorithm: str, options: dict[str, Any], what: str, tmp_path: Path
) -> None:
    base, _ = net()
    layer = "stem" if algorithm == "glora" else "heads.0"
    network = lycoris(algorithm, options, copy.deepcopy(base), (layer,))
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    with pytest.raises(FileError, match=what):
        pk.load(base, tmp_path / "a.safetensors")


@torch.no_grad()
def test_changes_of_biases_and_norms_are_named_and_can_be_left_out(tmp_path: Path) -> None:
    """A layer holds a change of its weight only; the rest of the file is right without."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 4)).eval()
    theirs = copy.deepcopy(base)
    LycorisNetwork.apply_preset({"target_module": [], "target_name": ["[013]"]})
    options: dict[str, Any] = {"lora_dim": 2, "alpha": 1, "train_norm": True, "warn_on_unmatched": False}
    network = LycorisNetwork(theirs, network_module="full", **options)
    network.apply_to()
    randomized(network.named_parameters())
    path = tmp_path / "full.safetensors"
    network.save_weights(str(path), torch.float32, {})
    assert {key.split(".")[1] for key in load_file(path)} == {"diff", "diff_b", "w_norm", "b_norm"}
    with pytest.raises(MismatchError) as error:
        pk.load(copy.deepcopy(base), path)
    for name in ("lycoris_0.bias", "lycoris_1.weight", "lycoris_1.bias", "lycoris_3.bias"):
        assert name in str(error.value)
    ours = copy.deepcopy(base)
    pk.load(ours, path, ignore=["*.diff_b", "*_norm"])
    for number in (0, 3):
        module: Any = network.loras[(0, 2)[number == 3]]
        base[number].weight.copy_(base[number].weight + module.custom_state_dict()["diff"])
    x = torch.randn(5, 8)
    torch.testing.assert_close(ours(x), base(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"algo": "lora"},
        {"algo": "lokr", "factor": 4, "dora_wd": True},
        {"algo": "diag-oft"},
    ],
    ids=lambda options: options["algo"],
)
@torch.no_grad()
def test_a_file_of_the_kohya_trainer_goes_to_each_of_its_models(options: dict[str, Any], tmp_path: Path) -> None:
    """One file for the U-Net and the text encoder, under lora_unet_ and lora_te_; each takes what is its own."""
    torch.manual_seed(0)
    unet, text_encoder = sd15_unet(), clip_text_model()
    their_unet, their_text_encoder = copy.deepcopy(unet), copy.deepcopy(text_encoder)
    network = create_network(
        1.0, 2, 1.0, None, their_text_encoder, their_unet, warn_on_unmatched=False, preset="attn-mlp", **options
    )
    network.apply_to(their_text_encoder, their_unet, True, True)
    randomized(network.named_parameters(), 0.05)
    path = tmp_path / "theirs.safetensors"
    network.save_weights(str(path), torch.float32, {"ss_base_model_version": "sd_v1"})
    prefixes = {key.partition("_")[2].partition("_")[0] for key in load_file(path)}
    assert prefixes == {"unet", "te"}
    ours = copy.deepcopy(unet), copy.deepcopy(text_encoder)
    with pytest.raises(MismatchError, match="lora_te_"):
        pk.load(ours[0], path)
    for model, component in zip(ours, ("unet", "text_encoder"), strict=True):
        pk.load(model, path, component=component)
    for found, theirs, base in zip(
        outputs(*ours), outputs(their_unet, their_text_encoder), outputs(unet, text_encoder), strict=True
    ):
        require_same_forward(found, theirs, base)


def outputs(unet: Any, text_encoder: Any) -> tuple[Tensor, Tensor]:
    """Of the U-Net, given states; and of the text encoder."""
    torch.manual_seed(3)
    x, states, ids = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8), torch.tensor([[0, 3, 7, 1]])
    return unet(x, torch.tensor([37]), states).sample, text_encoder(ids).last_hidden_state


# -- PEFT --------------------------------------------------------------------------------------------------------------

P_LORA: dict[str, Any] = {"r": 3, "lora_alpha": 2}
P_KRON: dict[str, Any] = {"r": 1, "alpha": 2, "decompose_factor": 4}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"heads.0": 5, "^stem": 2},
    "alpha_pattern": {"block.point": 7, "0": 4},
}
#: What PEFT can train: configuration, options, layers
PEFT: dict[str, tuple[type[peft.PeftConfig], dict[str, Any], tuple[str, ...]]] = {
    "LoRA": (peft.LoraConfig, P_LORA, NET_LAYERS),
    "LoRA of rank-stabilised scale": (peft.LoraConfig, {**P_LORA, "use_rslora": True}, NET_LAYERS),
    "LoRA of many ranks and alphas": (peft.LoraConfig, {**P_LORA, **PATTERNS}, NET_LAYERS),
    "LoRA of many ranks and alphas, rank-stabilised": (
        peft.LoraConfig,
        {**P_LORA, **PATTERNS, "use_rslora": True},
        NET_LAYERS,
    ),
    "DoRA": (peft.LoraConfig, {**P_LORA, "use_dora": True}, NET_LAYERS),
    "DoRA of many ranks, rank-stabilised": (
        peft.LoraConfig,
        {**P_LORA, **PATTERNS, "use_dora": True, "use_rslora": True},
        NET_LAYERS,
    ),
    "LoHa": (peft.LoHaConfig, {"r": 3, "alpha": 2}, NET_LAYERS),
    "LoHa of many ranks": (peft.LoHaConfig, {"r": 3, "alpha": 2, **PATTERNS}, NET_LAYERS),
    "LoHa Tucker": (peft.LoHaConfig, {"r": 3, "alpha": 2, "use_effective_conv2d": True}, NET_LAYERS),
    "LoKr": (peft.LoKrConfig, P_KRON, NET_LAYERS),
    "LoKr of two low-rank factors": (peft.LoKrConfig, {**P_KRON, "decompose_both": True}, NET_LAYERS),
    "LoKr full": (peft.LoKrConfig, {**P_KRON, "r": 16}, NET_LAYERS),
    "LoKr full, of many ranks": (
        peft.LoKrConfig,
        {**P_KRON, "r": 16, "rank_pattern": {"heads.0": 32}, "alpha_pattern": {"stem": 5}},
        NET_LAYERS,
    ),
    "LoKr Tucker": (peft.LoKrConfig, {**P_KRON, "use_effective_conv2d": True}, NET_LAYERS),
    "LoKr of the most even split": (peft.LoKrConfig, {"r": 2, "alpha": 3}, NET_LAYERS),
    "OFT by its series": (peft.OFTConfig, {"r": 0, "oft_block_size": 4}, POINTWISE),
    "OFT by eight terms": (
        peft.OFTConfig,
        {"r": 0, "oft_block_size": 8, "num_cayley_neumann_terms": 8},
        ("heads.0", "heads.1"),
    ),
    "OFT by solving": (
        peft.OFTConfig,
        {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False},
        ("heads.0", "heads.1"),
    ),
    "OFT of a number of blocks": (
        peft.OFTConfig,
        {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False},
        ("heads.0", "heads.1"),
    ),
    "OFT constrained": (
        peft.OFTConfig,
        {"r": 0, "oft_block_size": 4, "coft": True, "eps": 0.3, "use_cayley_neumann": False},
        ("heads.0", "heads.1"),
    ),
    "(IA)³ per input": (peft.IA3Config, {"feedforward_modules": ["heads.0", "heads.1"]}, ("heads.0", "heads.1")),
    "(IA)³ per output": (peft.IA3Config, {"feedforward_modules": []}, ("heads.1",)),  # the one without a bias
}


def peft_folder(
    config: type[peft.PeftConfig], options: Mapping[str, Any], layers: tuple[str, ...], folder: Path
) -> tuple[Path, Any, nn.Module, Tensor]:
    """A folder PEFT wrote, the model it trained, the base, and an input."""
    base, x = net()
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config(target_modules=list(layers), **options))  # type: ignore[call-arg]
    own = [(name, p) for name, p in theirs.named_parameters() if p.requires_grad]
    randomized(iter(own), 0.1 if config is peft.OFTConfig else 0.3)
    with warnings.catch_warnings():  # PEFT 0.21.2 takes a bias of its own for a torn factor
        warnings.simplefilter("ignore", PeftWarning)
        theirs.save_pretrained(str(folder / "theirs"))
    return folder / "theirs", theirs.eval(), base, x


@pytest.mark.parametrize("label", PEFT)
@torch.no_grad()
def test_a_folder_of_peft_computes_what_peft_did(label: str, tmp_path: Path) -> None:
    config, options, layers = PEFT[label]
    folder, theirs, base, x = peft_folder(config, options, layers, tmp_path)
    for path in (folder, folder / "adapter_model.safetensors"):
        ours = copy.deepcopy(base)
        report = pk.load(ours, path)
        assert sorted(report.loaded) == sorted(layers)
        require_same_forward(ours(x), theirs(x), base(x))


@torch.no_grad()
def test_fan_in_fan_out_is_of_a_weight_kept_as_in_out(tmp_path: Path) -> None:
    """GPT-2's Conv1D is no layer of ours, but its checkpoint can be merged into."""
    torch.manual_seed(0)
    base: Any = nn.Sequential(Conv1D(12, 8))
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    theirs: Any = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["0"], fan_in_fan_out=True, **P_LORA)
    )
    randomized((name, p) for name, p in theirs.named_parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    pk.merge_checkpoint(tmp_path / "base.safetensors", {tmp_path / "theirs": 1.0}, tmp_path / "merged.safetensors")
    merged, x = copy.deepcopy(base), torch.randn(4, 8)
    merged.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    require_same_forward(merged(x), theirs.eval()(x), base(x))


@pytest.mark.parametrize(
    "config, options, layers, what",
    [
        (peft.IA3Config, {"feedforward_modules": []}, ("heads.0", "heads.1"), "heads.0 has a bias"),
        (peft.LoraConfig, {**P_LORA, "init_lora_weights": "pissa"}, ("heads.0",), "pissa"),
        (peft.LoraConfig, {**P_LORA, "lora_bias": True}, ("heads.0",), "lora_B.bias"),
        (peft.LoraConfig, {**P_LORA, "bias": "lora_only"}, ("heads.0",), "heads.0.*bias"),
        (peft.LoraConfig, {**P_LORA, "modules_to_save": ["stem"]}, ("heads.0",), "stem"),
        (peft.VeraConfig, {"r": 2}, ("heads.1",), "VERA"),
        (peft.OFTConfig, {"r": 0, "oft_block_size": 4, "block_share": True}, ("heads.0",), "block_share"),
        (peft.RandLoraConfig, {"r": 2}, ("heads.1",), "RANDLORA"),
        (peft.HRAConfig, {"r": 2}, ("heads.1",), "HRA"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_not_read_of_peft_says_so(
    config: type[peft.PeftConfig], options: dict[str, Any], layers: tuple[str, ...], what: str, tmp_path: Path
) -> None:
    """Rather than adding to the base what was not meant to be added to it."""
    folder, _, base, _ = peft_folder(config, options, layers, tmp_path)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(FileError, match=what):
        pk.load(base, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not any(name for name, module in base.named_modules() if hasattr(module, "adapters"))


# -- diffusers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, metadata",
    [
        (P_LORA, True),
        (P_LORA, False),
        ({**P_LORA, "use_dora": True}, True),
        ({**P_LORA, "rank_pattern": {"conv1": 2}, "alpha_pattern": {"to_q": 7}}, True),
    ],
    ids=["LoRA", "LoRA without its configuration", "DoRA", "LoRA of many ranks and alphas"],
)
@torch.no_grad()
def test_a_file_of_diffusers_computes_what_diffusers_reads_of_it(
    options: dict[str, Any], metadata: bool, tmp_path: Path
) -> None:
    """With the configuration that is what was trained; without, the scale is lost, to diffusers too."""
    torch.manual_seed(0)
    pipe = stable_diffusion()
    base = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.text_encoder)
    config = peft.LoraConfig(target_modules=["to_q", "to_out.0", "conv1", "proj_in", "ff.net.2"], **options)
    text_config = peft.LoraConfig(target_modules=["q_proj", "fc1"], **P_LORA)
    pipe.unet.add_adapter(config)
    pipe.text_encoder.add_adapter(text_config)
    for model in (pipe.unet, pipe.text_encoder):
        randomized(((name, p) for name, p in model.named_parameters() if "lora" in name), 0.1)
    trained = outputs(pipe.unet, pipe.text_encoder)
    entries: dict[str, Any] = {}
    if metadata:
        entries = {
            "unet_lora_adapter_metadata": _plain(config),
            "text_encoder_lora_adapter_metadata": _plain(text_config),
        }
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        str(tmp_path),
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        **entries,
    )
    again = stable_diffusion()
    again.unet.load_state_dict(base[0].state_dict())
    again.text_encoder.load_state_dict(base[1].state_dict())
    path = tmp_path / "pytorch_lora_weights.safetensors"
    again.load_lora_weights(str(tmp_path), weight_name=path.name)
    theirs = outputs(again.unet, again.text_encoder)
    ours = copy.deepcopy(base)
    for model, component in zip(ours, ("unet", "text_encoder"), strict=True):
        pk.load(model, path, component=component)
    for found, expected, before, first in zip(outputs(*ours), theirs, outputs(*base), trained, strict=True):
        require_same_forward(found, expected, before)
        assert ((found - first).norm() < 1e-4 * first.norm()) == metadata


def _plain(config: peft.PeftConfig) -> dict[str, Any]:
    values = config.to_dict()
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in values.items()
        if isinstance(value, (str, int, float, bool, set, list, dict, type(None)))
    }


# -- every spelling, by hand -------------------------------------------------------------------------------------------

UP, DOWN = torch.randn(24, 3, generator=torch.Generator().manual_seed(1)), torch.arange(48.0).reshape(3, 16) / 48
PRODUCT = UP @ DOWN


def delta_of(model: nn.Module, weight: str) -> Tensor:
    """ΔW (m, n) of the one adapter on a weight, in float64."""
    (found,) = [at for at in installed_adapters(model, ["default"]) if at.site == weight]
    with torch.no_grad():
        return copy.deepcopy(found.adapter).double().eval()(found.base.double(), 1.0).dense()


def require_delta(model: nn.Module, weight: str, expected: Tensor) -> None:
    found = delta_of(model, weight)
    expected = expected.double().flatten(1)
    assert found.shape == expected.shape
    error = float((found - expected).norm())
    assert error <= 1e-6 * float(expected.norm()), f"{weight}: an error of {error:.2e}"


PAIRS = {
    "{}.lora_up.weight": "{}.lora_down.weight",
    "{}.lora_B.weight": "{}.lora_A.weight",
    "{}.lora_B": "{}.lora_A",
    "{}.lora_B.default.weight": "{}.lora_A.default.weight",
    "{}_lora.up.weight": "{}_lora.down.weight",
    "{}.lora.up.weight": "{}.lora.down.weight",
    "{}.lora_linear_layer.up.weight": "{}.lora_linear_layer.down.weight",
}
#: Where the module's name ends and its alpha's begins
ALPHAS = {"{}_lora.up.weight": "{}_lora.alpha"}
GENERIC = (
    "lycoris_heads_0",
    "lora_unet_heads_0",
    "base_model.model.heads.0",
    "diffusion_model.heads.0",
    "transformer.heads.0",
    "unet.heads.0",
    "heads.0",
)


@pytest.mark.parametrize("name", GENERIC)
@pytest.mark.parametrize("up", PAIRS)
def test_every_spelling_of_the_factors_means_the_same(up: str, name: str, tmp_path: Path) -> None:
    alpha = ALPHAS.get(up, "{}.alpha").format(name)
    file = {up.format(name): UP, PAIRS[up].format(name): DOWN, alpha: torch.tensor(1.5)}
    model, _ = net()
    pk.load(model, write(tmp_path / "a.safetensors", file))
    require_delta(model, "heads.0", 0.5 * PRODUCT)


@pytest.mark.parametrize("part", ["to_q", "to_k", "to_v", "to_out"])
@pytest.mark.parametrize("ending", ["{}_lora.{}.weight", "{}.lora_{}.weight", "{}.lora.{}.weight"])
@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_the_processors_of_old_diffusers_are_the_attention_itself(
    prefix: str, ending: str, part: str, tmp_path: Path
) -> None:
    """attn1.processor.to_out_lora is the module attn1.to_out.0."""
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    path = f"{block}.{'to_out.0' if part == 'to_out' else part}"
    up, down = torch.randn(320, 2), torch.randn(2, 320)
    stem = f"{prefix}{block}.processor.{part}"
    file = {ending.format(stem, "up"): up, ending.format(stem, "down"): down}
    model = tree({path: nn.Linear(320, 320)})
    pk.load(model, write(tmp_path / "a.safetensors", file))
    require_delta(model, path, up @ down)


def _linear(rows: int, columns: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(columns, rows)


def _conv(rows: int, columns: int, kernel: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(columns, rows, kernel)


_SD15_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
_XL_Q = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
_FC = "text_model.encoder.layers.3.mlp.fc1"
#: foreign name -> component, path and layer of its module, in the true sizes, which tell families apart
NAMES: dict[str, tuple[str, str, Callable[[], nn.Module]]] = {
    # SD 1.5: diffusers' path and the original's
    f"lora_unet_{_SD15_Q.replace('.', '_')}": ("unet", _SD15_Q, _linear(320, 320)),
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": ("unet", _SD15_Q, _linear(320, 320)),
    f"lycoris_{_SD15_Q.replace('.', '_')}": ("unet", _SD15_Q, _linear(320, 320)),
    f"unet.{_SD15_Q}": ("unet", _SD15_Q, _linear(320, 320)),
    _SD15_Q: ("unet", _SD15_Q, _linear(320, 320)),
    f"base_model.model.{_SD15_Q}": ("unet", _SD15_Q, _linear(320, 320)),
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": ("unet", _SD15_Q, _linear(320, 320)),
    "lora_unet_input_blocks_3_0_op": ("unet", "down_blocks.0.downsamplers.0.conv", _conv(320, 320, 3)),
    "lora_unet_output_blocks_11_1_proj_in": ("unet", "up_blocks.3.attentions.2.proj_in", _conv(320, 320, 1)),
    "lora_unet_input_blocks_1_0_emb_layers_1": ("unet", "down_blocks.0.resnets.0.time_emb_proj", _linear(320, 1280)),
    "lora_unet_time_embed_2": ("unet", "time_embedding.linear_2", _linear(1280, 1280)),
    "lora_unet_input_blocks_4_0_skip_connection": ("unet", "down_blocks.1.resnets.0.conv_shortcut", _conv(640, 320, 1)),
    "lora_unet_out_2": ("unet", "conv_out", _conv(4, 320, 3)),
    # SDXL
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": ("unet", _XL_Q, _linear(640, 2048)),
    f"lora_unet_{_XL_Q.replace('.', '_')}": ("unet", _XL_Q, _linear(640, 2048)),
    "lora_unet_label_emb_0_0": ("unet", "add_embedding.linear_1", _linear(1280, 2816)),
    "diffusion_model.output_blocks.5.2.conv": ("unet", "up_blocks.1.upsamplers.0.conv", _conv(640, 640, 3)),
    # text encoders
    f"lora_te_{_FC.replace('.', '_')}": ("text_encoder", _FC, _linear(3072, 768)),
    f"lora_te1_{_FC.replace('.', '_')}": ("text_encoder", _FC, _linear(3072, 768)),
    f"lora_te2_{_FC.replace('.', '_')}": ("text_encoder_2", _FC, _linear(5120, 1280)),
    f"text_encoder.{_FC}": ("text_encoder", _FC, _linear(3072, 768)),
    f"text_encoder_2.{_FC}": ("text_encoder_2", _FC, _linear(5120, 1280)),
    f"text_encoders.clip_l.transformer.{_FC}": ("text_encoder", _FC, _linear(3072, 768)),
    f"text_encoders.clip_g.transformer.{_FC}": ("text_encoder_2", _FC, _linear(5120, 1280)),
    "lora_te3_encoder_block_2_layer_1_DenseReluDense_wo": (
        "text_encoder_3",
        "encoder.block.2.layer.1.DenseReluDense.wo",
        _linear(4096, 10240),
    ),
    # SD 3
    "transformer.transformer_blocks.2.attn.to_add_out": (
        "transformer",
        "transformer_blocks.2.attn.to_add_out",
        _linear(1536, 1536),
    ),
    "lora_transformer_transformer_blocks_2_attn_to_add_out": (
        "transformer",
        "transformer_blocks.2.attn.to_add_out",
        _linear(1536, 1536),
    ),
    "lora_unet_joint_blocks_2_context_block_attn_proj": (
        "transformer",
        "transformer_blocks.2.attn.to_add_out",
        _linear(1536, 1536),
    ),
    "diffusion_model.joint_blocks.2.x_block.mlp.fc1": (
        "transformer",
        "transformer_blocks.2.ff.net.0.proj",
        _linear(6144, 1536),
    ),
    # Flux
    "lora_unet_txt_in": ("transformer", "context_embedder", _linear(3072, 4096)),
    "transformer.context_embedder": ("transformer", "context_embedder", _linear(3072, 4096)),
    "diffusion_model.img_in": ("transformer", "x_embedder", _linear(3072, 64)),
}


def light(make: Callable[[], nn.Module]) -> nn.Module:
    """A layer of a true size without its memory: one zero, seen everywhere."""
    with torch.device("meta"):
        layer: Any = make()
    layer.weight = nn.Parameter(torch.zeros(()).expand(layer.weight.shape), requires_grad=False)
    layer.bias = None
    return layer


def factors(rows: int, channels: int, kernel: tuple[int, ...], rank: int = 2) -> tuple[Tensor, Tensor]:
    """Of a LoRA in kohya's shapes."""
    ones = (1,) * len(kernel)
    return torch.randn(rows, rank, *ones), torch.randn(rank, channels, *kernel)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_a_module_finds_it(name: str, tmp_path: Path) -> None:
    """In a model that has that module only."""
    component, path, make = NAMES[name]
    layer: Any = light(make)
    rows, channels, *kernel = layer.weight.shape
    up, down = factors(rows, channels, tuple(kernel))
    file = under(name, {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(4.0)})
    model = tree({path: layer})
    assert pk.load(model, write(tmp_path / "a.safetensors", file), component=component).loaded == (path,)
    (found,) = installed_adapters(model, ["default"])
    probe = torch.randn(down[0].numel(), 5)
    with torch.no_grad():
        delta: Any = found.adapter.delta(found.base)
        expected = 2 * up.flatten(1) @ (down.flatten(1) @ probe)
        torch.testing.assert_close(delta.B @ (delta.A @ probe), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("prefix", ["lora_te_text_model_", "text_encoder.text_model."])
def test_a_text_encoder_of_transformers_5_takes_names_with_the_level_it_lacks(prefix: str, tmp_path: Path) -> None:
    path = "encoder.layers.3.mlp.fc1"
    name = prefix + (path if "." in prefix else path.replace(".", "_"))
    file = under(name, {"lora_up.weight": torch.ones(3072, 1), "lora_down.weight": torch.ones(1, 768)})
    model = tree({path: light(_linear(3072, 768))})
    report = pk.load(model, write(tmp_path / "a.safetensors", file), component="text_encoder")
    assert report.loaded == (path,)


def test_an_oft_of_sd_scripts_is_found_by_its_own_prefix(tmp_path: Path) -> None:
    blocks = 0.1 * torch.randn(80, 4, 4)
    file = under("oft_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", {"oft_blocks": blocks})
    file |= under("oft_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", {"alpha": torch.tensor(0.0)})
    model = tree({_SD15_Q: nn.Linear(320, 320)})
    pk.load(model, write(tmp_path / "a.safetensors", file))
    Q = (blocks - blocks.mT).double()
    W = model.get_submodule(_SD15_Q).weight.detach().double()
    R = (torch.eye(4) + Q) @ torch.linalg.inv(torch.eye(4) - Q)
    rotated = torch.einsum("knm,kni->kmi", R, W.reshape(80, 4, 320)).reshape(320, 320)
    found = delta_of(model, _SD15_Q)
    assert (found - (rotated - W)).norm() <= 1e-6 * W.norm()


# Layers that are one in the file and several in the model

QKV = tuple(f"transformer_blocks.2.attn.to_{part}" for part in "qkv")
FUSED: dict[str, tuple[tuple[str, ...], tuple[int, ...], int]] = {
    "lora_unet_joint_blocks_2_x_block_attn_qkv": (QKV, (1536, 1536, 1536), 1536),
    "diffusion_model.joint_blocks.2.context_block.attn.qkv": (
        tuple(f"transformer_blocks.2.attn.add_{part}_proj" for part in "qkv"),
        (1536, 1536, 1536),
        1536,
    ),
}


@pytest.mark.parametrize("kind", ["lora", "loha", "full", "ia3", "dora"])
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_layer_of_the_file_goes_by_rows_to_the_models_layers(name: str, kind: str, tmp_path: Path) -> None:
    paths, sizes, columns = FUSED[name]
    rows = sum(sizes)
    up, down = torch.randn(rows, 2) / 30, torch.randn(2, columns) / 30
    dense = up @ down
    tensors: dict[str, Tensor] = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0)}
    model = tree({path: nn.Linear(columns, size) for path, size in zip(paths, sizes, strict=True)})
    W = torch.cat([model.get_submodule(path).weight.detach() for path in paths])
    if kind == "loha":
        ups, downs = torch.randn(rows, 2) / 30, torch.randn(2, columns) / 30
        tensors = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": ups, "hada_w2_b": downs, "alpha": torch.tensor(2.0)}
        dense = dense * (ups @ downs)
    elif kind == "full":
        tensors = {"diff": dense}
    elif kind == "ia3":
        gate = torch.randn(rows) / 10
        tensors, dense = {"weight": gate, "on_input": torch.tensor(0)}, gate[:, None] * W
    elif kind == "dora":
        magnitude = W.norm(dim=1, keepdim=True) * 1.1
        tensors["dora_scale"] = magnitude
        V = (W + dense).double()
        dense = V * (magnitude / V.norm(dim=1, keepdim=True)) - W
    pk.load(model, write(tmp_path / "a.safetensors", under(name, tensors)))
    for path, part, own in zip(paths, dense.double().split(sizes), W.split(sizes), strict=True):
        allowed = 1e-6 * float(part.norm() + (own.norm() if kind in ("dora", "ia3") else 0.0))
        assert (delta_of(model, path) - part).norm() <= allowed


def test_what_mixes_the_rows_of_a_fused_layer_is_refused(tmp_path: Path) -> None:
    model = tree({path: nn.Linear(1536, 1536) for path in QKV})
    file = under("lora_unet_joint_blocks_2_x_block_attn_qkv", {"oft_blocks": torch.randn(1152, 4, 4) / 10})
    with pytest.raises(FileError, match="mixes the rows"):
        pk.load(model, write(tmp_path / "a.safetensors", file))


def test_halves_in_the_order_of_the_original_are_exchanged(tmp_path: Path) -> None:
    """norm_out of diffusers has (scale, shift) where the original has (shift, scale)."""
    up, down = torch.randn(3072, 2), torch.randn(2, 1536)
    tensors = {"lora_up.weight": up, "lora_down.weight": down}
    for name, swapped in (
        ("lora_unet_final_layer_adaLN_modulation_1", True),
        ("diffusion_model.final_layer.adaLN_modulation.1", True),
        ("transformer.norm_out.linear", False),
        ("lora_transformer_norm_out_linear", False),
    ):
        model = tree({"norm_out.linear": nn.Linear(1536, 3072)})
        pk.load(model, write(tmp_path / "a.safetensors", under(name, tensors)))
        require_delta(model, "norm_out.linear", (up.roll(1536, 0) if swapped else up) @ down)


# -- the scale ---------------------------------------------------------------------------------------------------------

HEAD = {"lora_up.weight": UP, "lora_down.weight": DOWN}


def loaded(tensors: Mapping[str, Tensor], folder: Path, **options: Any) -> nn.Module:
    """The small model with these tensors on heads.0."""
    model, _ = net()
    pk.load(model, write(folder / "a.safetensors", under("lora_unet_heads_0", tensors)), **options)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alpha_is_one_number_of_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    model = loaded({**HEAD, "alpha": torch.full(shape, 6, dtype=dtype)}, tmp_path)
    require_delta(model, "heads.0", 2 * PRODUCT)


def test_without_an_alpha_the_scale_is_one(tmp_path: Path) -> None:
    require_delta(loaded(HEAD, tmp_path), "heads.0", PRODUCT)


def test_an_alpha_of_zero_is_asked_about(tmp_path: Path) -> None:
    """A1111, ComfyUI, Forge and diffusers read it as off, sd-scripts and LyCORIS as the rank."""
    tensors = {**HEAD, "alpha": torch.tensor(0.0)}
    with pytest.raises(AmbiguousFileError, match="alpha_zero"):
        loaded(tensors, tmp_path)
    require_delta(loaded(tensors, tmp_path, alpha_zero="rank"), "heads.0", PRODUCT)
    require_delta(loaded(tensors, tmp_path, alpha_zero="off"), "heads.0", 0 * PRODUCT)
    with pytest.raises(OptionError, match="alpha_zero"):
        loaded(tensors, tmp_path, alpha_zero="zero")


@pytest.mark.parametrize("alpha", [torch.tensor([1.0, 2.0]), torch.tensor(float("nan")), torch.tensor(float("inf"))])
def test_an_alpha_that_is_no_number_is_refused(alpha: Tensor, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="alpha"):
        loaded({**HEAD, "alpha": alpha}, tmp_path)


def test_two_full_factors_of_lokr_have_no_scale(tmp_path: Path) -> None:
    """Alpha is ignored; with one factor of low rank it is divided by that, with two by w2's."""
    w1, w2 = torch.randn(4, 2), torch.randn(6, 8)
    model = loaded({"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(5.0)}, tmp_path)
    require_delta(model, "heads.0", torch.kron(w1, w2))
    a, b = torch.randn(6, 3), torch.randn(3, 8)
    model = loaded({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(6.0)}, tmp_path)
    require_delta(model, "heads.0", 2 * torch.kron(w1, a @ b))
    c, d = torch.randn(4, 2), torch.randn(2, 2)
    model = loaded({"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2": w2, "alpha": torch.tensor(6.0)}, tmp_path)
    require_delta(model, "heads.0", 3 * torch.kron(c @ d, w2))
    both = {"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(6.0)}
    require_delta(loaded(both, tmp_path), "heads.0", 2 * torch.kron(c @ d, a @ b))


@pytest.mark.parametrize("old", [True, False])
def test_both_layouts_of_glora_are_read(old: bool, tmp_path: Path) -> None:
    a1, a2, b1, b2 = torch.randn(16, 3), torch.randn(3, 16), UP, DOWN
    file = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": torch.tensor(1.5)}
    if old:
        file |= {"a1.weight": a2, "a2.weight": a1, "b1.weight": b2, "b2.weight": b1}
    model = loaded(file, tmp_path)
    W = model.get_submodule("heads.0").weight.detach().double()
    expected = 0.5 * (W @ a1.double() @ a2.double() + b1.double() @ b2.double())
    require_delta(model, "heads.0", expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_factors_are_read_as_the_numbers_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in HEAD.items()}
    model = loaded(tensors, tmp_path)
    require_delta(model, "heads.0", tensors["lora_up.weight"].float() @ tensors["lora_down.weight"].float())


# -- DoRA --------------------------------------------------------------------------------------------------------------


def decomposed(W: Tensor, V: Tensor, magnitude: Tensor, axis: str) -> Tensor:
    """m·(W + V)/‖W + V‖ − W per row, or per input channel over rows and kernel."""
    W, whole = W.double(), W.double() + V.double().reshape(W.shape)
    dims = tuple(range(1, W.dim())) if axis == "out" else (0, *range(2, W.dim()))
    shape = (-1, *(1,) * (W.dim() - 1)) if axis == "out" else (1, -1, *(1,) * (W.dim() - 2))
    norms = torch.linalg.vector_norm(whole, dim=dims, keepdim=True)
    return whole * magnitude.double().reshape(shape) / norms - W


def _dora_file(layer: nn.Module, axis: str, shape: tuple[int, ...]) -> tuple[Tensors, Tensor]:
    W: Tensor = layer.weight.detach()  # type: ignore[assignment,operator]
    up, down = factors(W.shape[0], W.shape[1], tuple(W.shape[2:]))
    magnitude = torch.rand(W.shape[0] if axis == "out" else W.shape[1]) + 0.5
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": magnitude.reshape(shape)}
    return tensors, decomposed(W, up.flatten(1) @ down.flatten(1), magnitude, axis)


DORA = {
    "heads.0": {"out": [(24, 1), (24,)], "in": [(1, 16), (16,)]},
    "stem": {"out": [(8, 1, 1, 1), (8,)], "in": [(1, 4, 1, 1), (4,)]},
    "block.down": {"out": [(16, 1, 1, 1)], "in": [(1, 16, 1, 1)]},
    "block.point": {"out": [(16, 1, 1, 1), (16,)], "in": [(1, 8, 1, 1), (8,)]},
}


@pytest.mark.parametrize(
    "name, axis, shape",
    [(name, axis, shape) for name, axes in DORA.items() for axis, shapes in axes.items() for shape in shapes],
)
def test_the_shape_of_a_magnitude_says_its_axis(name: str, axis: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    model, _ = net()
    tensors, expected = _dora_file(model.get_submodule(name), axis, shape)
    W: Any = model.get_submodule(name).weight
    pk.load(model, write(tmp_path / "a.safetensors", under(f"lycoris_{name.replace('.', '_')}", tensors)))
    assert (delta_of(model, name) - expected.flatten(1)).norm() <= 1e-6 * (expected.norm() + W.norm())


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_a_bare_vector_on_a_square_weight_asks(layer: str, axis: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"square": nn.Linear(6, 6) if layer == "linear" else nn.Conv2d(6, 6, 3)})
    tensors, expected = _dora_file(model["square"], axis, (6,))
    path = write(tmp_path / "a.safetensors", under("lycoris_square", tensors))
    with pytest.raises(AmbiguousFileError, match="dora_axis"):
        pk.load(model, path)
    pk.load(model, path, dora_axis=axis)
    W: Any = model["square"].weight
    assert (delta_of(model, "square") - expected.flatten(1)).norm() <= 1e-6 * (expected.norm() + W.norm())


@pytest.mark.parametrize("tail", ["", ".weight", ".default.weight"])
@pytest.mark.parametrize("name, shape", [("heads.0", (24,)), ("stem", (1, 8, 1, 1))])
def test_pefts_magnitude_is_per_output_whatever_its_shape(
    name: str, shape: tuple[int, ...], tail: str, tmp_path: Path
) -> None:
    model, _ = net()
    tensors, expected = _dora_file(model.get_submodule(name), "out", shape)
    file = {
        f"unet.{name}.lora_B.weight": tensors["lora_up.weight"],
        f"unet.{name}.lora_A.weight": tensors["lora_down.weight"],
        f"unet.{name}.lora_magnitude_vector{tail}": tensors["dora_scale"],
    }
    W: Any = model.get_submodule(name).weight
    pk.load(model, write(tmp_path / "a.safetensors", file))
    assert (delta_of(model, name) - expected.flatten(1)).norm() <= 1e-6 * (expected.norm() + W.norm())


# -- files that mean nothing -------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[Tensors, str]] = {
    "a lone up": ({"lora_up.weight": UP}, "down"),
    "a lone down": ({"lora_down.weight": DOWN}, "up"),
    "a lone alpha": ({"alpha": torch.tensor(1.0)}, "alpha"),
    "a lone magnitude": ({"dora_scale": torch.ones(24, 1)}, "dora_scale"),
    "a lone magnitude with its alpha": ({"dora_scale": torch.ones(24, 1), "alpha": torch.tensor(1.0)}, "dora_scale"),
    "half a LoHa": ({"hada_w1_a": UP, "hada_w1_b": DOWN}, "hada_w2_a"),
    "half a core": ({**{f"hada_w{i}_{ab}": UP for i in "12" for ab in "ab"}, "hada_t1": UP}, "hada_t2"),
    "a lone w1": ({"lokr_w1": UP}, "lokr_w2"),
    "a w1 in one half": ({"lokr_w1_a": UP, "lokr_w2": DOWN}, "lokr_w1_b"),
    "a w2 twice": ({"lokr_w1": UP, "lokr_w2": DOWN, "lokr_w2_a": UP, "lokr_w2_b": DOWN}, "lokr_w2_a"),
    "two structures": ({**HEAD, "lokr_w1": UP, "lokr_w2": DOWN}, "lokr_w1"),
    "a change and factors": ({**HEAD, "diff": PRODUCT}, "diff"),
    "two magnitudes": ({**HEAD, "dora_scale": UP[:, :1], "lora_magnitude_vector": UP[:, 0]}, "magnitude"),
    "ranks that differ": ({"lora_up.weight": UP[:, :2], "lora_down.weight": DOWN}, "ranks"),
    "factors of LoHa that differ": (
        {"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": UP, "hada_w2_b": DOWN[:, :8]},
        "differ",
    ),
    "part of a GLoRA": ({"a1.weight": DOWN.mT, "a2.weight": DOWN, "b1.weight": UP}, "b2"),
    "a lone rescale": ({"rescale": torch.ones(24, 1)}, "oft_blocks"),
    "numbers that are whole": ({"lora_up.weight": UP.long(), "lora_down.weight": DOWN}, "int64"),
    "a magnitude of another size": ({**HEAD, "dora_scale": torch.ones(7, 1)}, "dora_scale"),
}


@pytest.mark.parametrize("label", BROKEN)
def test_a_set_that_is_no_adapter_is_refused_by_name(label: str, tmp_path: Path) -> None:
    """The message names the module and the tensor, and nothing is changed."""
    tensors, what = BROKEN[label]
    model, _ = net()
    with pytest.raises(FileError, match=what) as error:
        pk.load(model, write(tmp_path / "a.safetensors", under("lora_unet_heads_0", tensors)))
    assert "heads_0" in str(error.value)
    assert not any(hasattr(module, "adapters") for module in model.modules())


WRONG: dict[str, tuple[Tensors, str]] = {
    "other rows": ({"lora_up.weight": torch.randn(12, 3), "lora_down.weight": DOWN}, "12×16"),
    "other columns": ({"lora_up.weight": UP, "lora_down.weight": torch.randn(3, 8)}, "24×8"),
    "the transpose, of as many numbers": ({"lora_up.weight": torch.randn(16, 3), "lora_down.weight": UP.mT}, "16×24"),
    "a kernel on a Linear": (
        {"lora_up.weight": UP[..., None, None], "lora_down.weight": torch.randn(3, 4, 2, 2)},
        "2×2",
    ),
    "a change of another shape": ({"diff": PRODUCT.mT}, "16×24"),
    "NaN": ({"lora_up.weight": UP, "lora_down.weight": DOWN * float("nan")}, "non-finite"),
    "infinity": ({"lora_up.weight": UP / 0, "lora_down.weight": DOWN}, "non-finite"),
    "a magnitude that is NaN": ({**HEAD, "dora_scale": torch.full((24, 1), float("nan"))}, "non-finite"),
}


@pytest.mark.parametrize("label", WRONG)
def test_an_adapter_of_another_weight_is_refused(label: str, tmp_path: Path) -> None:
    """A1111, Forge and ComfyUI apply one of as many numbers garbled."""
    tensors, what = WRONG[label]
    model, _ = net()
    with pytest.raises(MismatchError, match=what) as error:
        pk.load(model, write(tmp_path / "a.safetensors", under("lora_unet_heads_0", tensors)))
    assert "heads.0" in str(error.value)


def test_a_kernel_of_as_many_numbers_is_another_weight(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layer": nn.Conv2d(4, 8, (1, 3))})
    file = under(
        "lycoris_layer", {"lora_up.weight": torch.randn(8, 2, 1, 1), "lora_down.weight": torch.randn(2, 4, 3, 1)}
    )
    with pytest.raises(MismatchError, match="3×1"):
        pk.load(model, write(tmp_path / "a.safetensors", file))


def test_flattened_factors_fit_the_weight_they_are_of(tmp_path: Path) -> None:
    """A 2-dimensional down on a convolution, and a 4-dimensional one on a Linear, as the WebUIs read them."""
    up, down = torch.randn(8, 2), torch.randn(2, 4, 3, 3)
    for tensors in (
        {"lora_up.weight": up, "lora_down.weight": down.flatten(1)},
        {"lora_up.weight": up[..., None, None], "lora_down.weight": down},
    ):
        model, _ = net()
        pk.load(model, write(tmp_path / "a.safetensors", under("lycoris_stem", tensors)))
        require_delta(model, "stem", up @ down.flatten(1))
    four = {"lora_up.weight": UP[..., None, None], "lora_down.weight": DOWN[..., None, None]}
    require_delta(loaded(four, tmp_path), "heads.0", PRODUCT)


def test_two_keys_of_one_role_are_refused(tmp_path: Path) -> None:
    file = {**under("heads.0", HEAD), "heads.0.lora_B.weight": UP}
    with pytest.raises(FileError, match=r"lora_up.*lora_B|lora_B.*lora_up"):
        pk.load(net()[0], write(tmp_path / "a.safetensors", file))


def test_two_names_of_one_weight_are_refused(tmp_path: Path) -> None:
    """Which would win depends on the program."""
    file = {**under("lora_unet_heads_0", HEAD), **under("lycoris_heads_0", HEAD)}
    with pytest.raises(FileError, match=r"heads.0"):
        pk.load(net()[0], write(tmp_path / "a.safetensors", file))


@pytest.mark.parametrize(
    "suffix", ["scale", "reshape_weight", "set_weight", "bias", "bm.weight", "oft_diag", "lora_up"]
)
def test_a_tensor_of_no_known_role_is_listed(suffix: str, tmp_path: Path) -> None:
    """Some programs read these; a file that has them means something else without."""
    with pytest.raises(MismatchError, match=f"lora_unet_heads_0.{suffix}"):
        loaded({**HEAD, suffix: torch.ones(2)}, tmp_path)


def test_tensors_that_are_no_adapters_are_listed_and_can_be_ignored(tmp_path: Path) -> None:
    file = {**under("lora_unet_heads_0", HEAD), "logit_scale": torch.ones(1), "emb.token": torch.ones(3)}
    path = write(tmp_path / "a.safetensors", file)
    with pytest.raises(MismatchError) as error:
        pk.load(net()[0], path)
    assert all(part in str(error.value) for part in ("logit_scale", "emb.token", "ignore="))
    with pytest.raises(MismatchError, match=r"emb\.token"):
        pk.load(net()[0], path, ignore="logit_scale")
    model, _ = net()
    pk.load(model, path, ignore=["logit_scale", "emb.*"])
    require_delta(model, "heads.0", PRODUCT)
    with pytest.raises(OptionError, match="nothing_like"):
        pk.load(net()[0], path, ignore=["logit_scale", "emb.*", "nothing_like*"])


def test_modules_the_model_lacks_are_listed_and_the_rest_loads_if_told(tmp_path: Path) -> None:
    file = {**under("lora_unet_heads_0", HEAD), **under("lora_unet_heads_7", HEAD)}
    path = write(tmp_path / "a.safetensors", file)
    with pytest.raises(MismatchError, match="lora_unet_heads_7"):
        pk.load(net()[0], path)
    model, _ = net()
    report = pk.load(model, path, strict=False)
    assert report.loaded == ("heads.0",)
    assert all("heads_7" in key for key in report.unexpected)
    assert report.unexpected
    require_delta(model, "heads.0", PRODUCT)


def test_weights_of_peft_without_their_configuration_ask_for_it(tmp_path: Path) -> None:
    file = {"base_model.model.heads.0.lora_B.weight": UP, "base_model.model.heads.0.lora_A.weight": DOWN}
    with pytest.raises(AmbiguousFileError, match=r"adapter_config\.json"):
        pk.load(net()[0], write(tmp_path / "adapter_model.safetensors", file))


def test_a_scale_that_is_said_twice_asks(tmp_path: Path) -> None:
    """diffusers refuses a file with its configuration and with alphas."""
    config = json.dumps({"unet.r": 3, "unet.lora_alpha": 6})
    file = {"unet.heads.0.lora_B.weight": UP, "unet.heads.0.lora_A.weight": DOWN}
    model, _ = net()
    pk.load(model, write(tmp_path / "a.safetensors", file, {"lora_adapter_metadata": config}))
    require_delta(model, "heads.0", 2 * PRODUCT)
    file["unet.heads.0.alpha"] = torch.tensor(6.0)
    with pytest.raises(AmbiguousFileError, match="twice"):
        pk.load(net()[0], write(tmp_path / "a.safetensors", file, {"lora_adapter_metadata": config}))


def test_an_ambiguous_underscored_name_asks(tmp_path: Path) -> None:
    model = tree({"a.b_c": nn.Linear(16, 24), "a_b.c": nn.Linear(16, 24)})
    with pytest.raises(AmbiguousFileError, match=r"a\.b_c or a_b\.c"):
        pk.load(model, write(tmp_path / "a.safetensors", under("lycoris_a_b_c", HEAD)))
    pk.load(model, write(tmp_path / "b.safetensors", under("a.b_c", HEAD)))
    require_delta(model, "a.b_c", PRODUCT)


# -- there and back ----------------------------------------------------------------------------------------------------

TRIPS = [
    (a, t, layer)
    for a in ADAPTERS
    for layer in (("linear", "conv 1×1") if ADAPTERS[a].kind == "glora" else ("linear", "conv 3×3"))
    if exists(a, layer)
    for t in TARGETS
]


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
    geodesic = getattr(ours.adapter, "geodesic", False)
    strengths = (1.0,) if written.how != "exact" or geodesic else (1.0, 0.4, -1.0)
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
    f"lora_unet_{_SD15_Q.replace('.', '_')}": ("sd15", f"unet.{_SD15_Q}", 320, 320),
    f"lycoris_{_SD15_Q.replace('.', '_')}": ("sd15", f"unet.{_SD15_Q}", 320, 320),
    f"unet.{_SD15_Q}": ("sd15", f"unet.{_SD15_Q}", 320, 320),
    f"base_model.model.{_SD15_Q}": ("sd15", f"unet.{_SD15_Q}", 320, 320),
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": ("sdxl", f"unet.{_XL_Q}", 640, 2048),
    "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k": ("sdxl", f"unet.{_XL_Q}", 640, 2048),
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
    "diffusion_model.img_in": ("flux", "transformer.x_embedder", 3072, 64),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_of_a_known_family_needs_no_base(name: str, target: str, tmp_path: Path) -> None:
    """Its names and shapes say which model it is for."""
    family, canonical, rows, columns = FOREIGN[name]
    up, down = torch.randn(rows, 2), torch.randn(2, columns)
    tensors = under(name, {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(4.0)})
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
    file = under("lora_unet_joint_blocks_2_x_block_attn_qkv", {"lora_up.weight": up, "lora_down.weight": down})
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
    file = {**under("lora_unet_heads_0", HEAD), "lora_unet_heads_0.diff_b": torch.ones(24)}
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
    tensors: Tensors, alpha: float | None, rows: int, channels: int, kernel: tuple[int, ...], at: Path
) -> Tensor:
    """ΔW (m, n) of a file on a fresh layer of that shape."""
    layer = CONVOLUTIONS[len(kernel)](channels, rows, kernel) if kernel else nn.Linear(channels, rows)
    model = nn.ModuleDict({"a": nn.ModuleDict({"layer": layer})})
    file = under("lora_unet_a_layer", tensors | ({} if alpha is None else {"alpha": torch.tensor(alpha)}))
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
    file: Tensors = {}
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
    file: Tensors = {}
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
    tensors, expected = _dora_file(model["layer"], axis, (rows, 1) if axis == "out" else (1, columns))
    W: Any = model["layer"].weight
    pk.load(model, write(tmp_path / "a.safetensors", under("lycoris_layer", tensors)))
    whole = W.detach().double() + (tensors["lora_up.weight"] @ tensors["lora_down.weight"]).double()
    assert (delta_of(model, "layer") - expected).norm() <= 1e-5 * (expected.norm() + W.norm() + whole.norm())
