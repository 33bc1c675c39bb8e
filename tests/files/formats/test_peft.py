"""Files that PEFT and diffusers wrote are read as they mean them: the oracle is their forward."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft.utils import get_peft_model_state_dict
from peft.utils.warning import PeftWarning
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import FileError
from tests.support.cells import require_same_forward
from tests.support.foreign import POINTWISE, randomized, separate_outputs
from tests.support.models import CONV_NET_LAYERS, conv_net
from tests.support.real import stable_diffusion

# -- PEFT --------------------------------------------------------------------------------------------------------------

P_LORA: dict[str, Any] = {"r": 3, "lora_alpha": 2}
P_KRON: dict[str, Any] = {"r": 1, "alpha": 2, "decompose_factor": 4}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"heads.0": 5, "^stem": 2},
    "alpha_pattern": {"block.point": 7, "0": 4},
}
#: What PEFT can train: configuration, options, layers
PEFT: dict[str, tuple[type[peft.PeftConfig], dict[str, Any], tuple[str, ...]]] = {
    "LoRA": (peft.LoraConfig, P_LORA, CONV_NET_LAYERS),
    "LoRA of rank-stabilised scale": (peft.LoraConfig, {**P_LORA, "use_rslora": True}, CONV_NET_LAYERS),
    "LoRA of many ranks and alphas": (peft.LoraConfig, {**P_LORA, **PATTERNS}, CONV_NET_LAYERS),
    "LoRA of many ranks and alphas, rank-stabilised": (
        peft.LoraConfig,
        {**P_LORA, **PATTERNS, "use_rslora": True},
        CONV_NET_LAYERS,
    ),
    "DoRA": (peft.LoraConfig, {**P_LORA, "use_dora": True}, CONV_NET_LAYERS),
    "DoRA of many ranks, rank-stabilised": (
        peft.LoraConfig,
        {**P_LORA, **PATTERNS, "use_dora": True, "use_rslora": True},
        CONV_NET_LAYERS,
    ),
    "LoHa": (peft.LoHaConfig, {"r": 3, "alpha": 2}, CONV_NET_LAYERS),
    "LoHa of many ranks": (peft.LoHaConfig, {"r": 3, "alpha": 2, **PATTERNS}, CONV_NET_LAYERS),
    "LoHa Tucker": (peft.LoHaConfig, {"r": 3, "alpha": 2, "use_effective_conv2d": True}, CONV_NET_LAYERS),
    "LoKr": (peft.LoKrConfig, P_KRON, CONV_NET_LAYERS),
    "LoKr of two low-rank factors": (peft.LoKrConfig, {**P_KRON, "decompose_both": True}, CONV_NET_LAYERS),
    "LoKr full": (peft.LoKrConfig, {**P_KRON, "r": 16}, CONV_NET_LAYERS),
    "LoKr full, of many ranks": (
        peft.LoKrConfig,
        {**P_KRON, "r": 16, "rank_pattern": {"heads.0": 32}, "alpha_pattern": {"stem": 5}},
        CONV_NET_LAYERS,
    ),
    "LoKr Tucker": (peft.LoKrConfig, {**P_KRON, "use_effective_conv2d": True}, CONV_NET_LAYERS),
    "LoKr of the most even split": (peft.LoKrConfig, {"r": 2, "alpha": 3}, CONV_NET_LAYERS),
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
    base, x = conv_net()
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


@pytest.mark.parametrize(
    "config, options, layers, what",
    [
        (peft.IA3Config, {"feedforward_modules": []}, ("heads.0", "heads.1"), "heads.0 has a bias"),
        (peft.LoraConfig, {**P_LORA, "init_lora_weights": "pissa"}, ("heads.0",), "pissa"),
        (peft.VeraConfig, {"r": 2, "save_projection": False}, ("heads.1",), "vera_B and vera_A are not in the file"),
        (peft.OFTConfig, {"r": 0, "oft_block_size": 4, "block_share": True}, ("heads.0",), "block_share"),
        (peft.RandLoraConfig, {"r": 2, "save_projection": False}, ("heads.1",), "randlora_A are not in the file"),
        (peft.HRAConfig, {"r": 2}, ("heads.1",), "HRA"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.filterwarnings("ignore:Specified to not save")
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
    trained = separate_outputs(pipe.unet, pipe.text_encoder)
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
    theirs = separate_outputs(again.unet, again.text_encoder)
    ours = copy.deepcopy(base)
    for model, component in zip(ours, ("unet", "text_encoder"), strict=True):
        pk.load(model, path, component=component)
    for found, expected, before, first in zip(
        separate_outputs(*ours), theirs, separate_outputs(*base), trained, strict=True
    ):
        require_same_forward(found, expected, before)
        assert ((found - first).norm() < 1e-4 * first.norm()) == metadata


def _plain(config: peft.PeftConfig) -> dict[str, Any]:
    values = config.to_dict()
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in values.items()
        if isinstance(value, (str, int, float, bool, set, list, dict, type(None)))
    }
