"""Files that LyCORIS wrote are read as LyCORIS means them.

Of a package's own file the oracle is the package's forward, never its merge: LyCORIS merges LoHa and LoKr with α/r
applied twice.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.kohya import create_network
from lycoris.wrapper import LycorisNetwork
from safetensors.torch import load_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import FileError, MismatchError
from tests.support.cells import require_same_forward
from tests.support.files import write
from tests.support.foreign import POINTWISE, randomized, separate_outputs
from tests.support.models import CONV_NET_LAYERS, conv_net
from tests.support.real import clip_text_model, sd15_unet

KERNELS = ("stem", "block.down")
LOW: dict[str, Any] = {"lora_dim": 3, "alpha": 2}
KRON: dict[str, Any] = {"lora_dim": 1, "alpha": 2, "factor": 4}
#: What LyCORIS can train: algorithm, options, layers
LYCORIS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "LoCon": ("locon", LOW, CONV_NET_LAYERS),
    "LoCon of rank-stabilised scale": ("locon", {**LOW, "rs_lora": True}, CONV_NET_LAYERS),
    "LoCon with a scalar": ("locon", {**LOW, "use_scalar": True}, CONV_NET_LAYERS),
    "LoCon Tucker": ("locon", {**LOW, "use_tucker": True}, CONV_NET_LAYERS),
    "LoHa": ("loha", LOW, CONV_NET_LAYERS),
    "LoHa Tucker": ("loha", {**LOW, "use_tucker": True}, CONV_NET_LAYERS),
    "LoHa with a scalar": ("loha", {**LOW, "use_scalar": True}, CONV_NET_LAYERS),
    "LoKr": ("lokr", KRON, CONV_NET_LAYERS),
    "LoKr of two low-rank factors": ("lokr", {**KRON, "decompose_both": True}, CONV_NET_LAYERS),
    "LoKr full": ("lokr", {**KRON, "full_matrix": True}, CONV_NET_LAYERS),
    "LoKr Tucker": ("lokr", {**KRON, "use_tucker": True}, CONV_NET_LAYERS),
    "LoKr Tucker of two low-rank factors": (
        "lokr",
        {**KRON, "use_tucker": True, "decompose_both": True},
        CONV_NET_LAYERS,
    ),
    "LoKr of an unbalanced split": ("lokr", {**KRON, "unbalanced_factorization": True}, CONV_NET_LAYERS),
    "LoKr with a scalar": ("lokr", {**KRON, "use_scalar": True}, CONV_NET_LAYERS),
    "LoKr of rank-stabilised scale": ("lokr", {**KRON, "lora_dim": 2, "factor": 2, "rs_lora": True}, POINTWISE),
    "DoRA per output": ("locon", {**LOW, "weight_decompose": True, "wd_on_out": True}, CONV_NET_LAYERS),
    "DoRA per input": ("locon", {**LOW, "weight_decompose": True, "wd_on_out": False}, CONV_NET_LAYERS),
    "DoRA Tucker": ("locon", {**LOW, "weight_decompose": True, "use_tucker": True}, CONV_NET_LAYERS),
    "DoRA of LoHa per output": ("loha", {**LOW, "weight_decompose": True}, CONV_NET_LAYERS),
    "DoRA of LoHa per input": ("loha", {**LOW, "weight_decompose": True, "wd_on_out": False}, CONV_NET_LAYERS),
    "DoRA of LoKr per output": ("lokr", {**KRON, "weight_decompose": True}, CONV_NET_LAYERS),
    "DoRA of LoKr per input": ("lokr", {**KRON, "weight_decompose": True, "wd_on_out": False}, CONV_NET_LAYERS),
    "OFT": ("diag-oft", {"lora_dim": 4, "alpha": 1}, CONV_NET_LAYERS),
    "OFT rescaled": ("diag-oft", {"lora_dim": 4, "alpha": 1, "rescaled": True}, CONV_NET_LAYERS),
    "OFT constrained": ("diag-oft", {"lora_dim": 4, "alpha": 1, "constraint": 0.02}, CONV_NET_LAYERS),
    "BOFT": ("boft", {"lora_dim": 12, "alpha": 1}, CONV_NET_LAYERS),
    "BOFT rescaled": ("boft", {"lora_dim": 12, "alpha": 1, "rescaled": True}, CONV_NET_LAYERS),
    "BOFT constrained": ("boft", {"lora_dim": 12, "alpha": 1, "constraint": 0.02}, CONV_NET_LAYERS),
    "full": ("full", {"lora_dim": 1, "alpha": 1}, ("heads.1",)),  # the one without a bias
    "GLoRA": ("glora", LOW, CONV_NET_LAYERS),
    "(IA)³ per output": ("ia3", {"lora_dim": 1, "alpha": 1}, CONV_NET_LAYERS),
    "(IA)³ per input": ("ia3", {"lora_dim": 1, "alpha": 1, "train_on_input": True}, CONV_NET_LAYERS),
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
    base, x = conv_net()
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
        ("tlora", {"lora_dim": 2, "alpha": 1}, "lambda_layer"),
    ],
)
def test_what_is_not_read_of_lycoris_says_so(
    algorithm: str, options: dict[str, Any], what: str, tmp_path: Path
) -> None:
    base, _ = conv_net()
    network = lycoris(algorithm, options, copy.deepcopy(base), ("heads.0",))
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    with pytest.raises(FileError, match=what):
        pk.load(base, tmp_path / "a.safetensors")


@torch.no_grad()
def test_changes_of_biases_and_norms_are_loaded_and_can_be_left_out(tmp_path: Path) -> None:
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
    x, whole = torch.randn(5, 8), copy.deepcopy(base)
    assert set(pk.load(whole, path).loaded) == {"0", "0.bias", "1", "1.bias", "3", "3.bias"}
    require_same_forward(whole(x), theirs(x), base(x))
    with pytest.raises(MismatchError, match=r"lycoris_1\.weight"):
        pk.load(nn.Sequential(copy.deepcopy(base[0]), nn.Identity(), nn.Tanh(), copy.deepcopy(base[3])), path)
    ours = copy.deepcopy(base)
    pk.load(ours, path, ignore=["*.diff_b", "*_norm"])
    for number in (0, 3):
        module: Any = network.loras[(0, 2)[number == 3]]
        base[number].weight.copy_(base[number].weight + module.custom_state_dict()["diff"])
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
        separate_outputs(*ours),
        separate_outputs(their_unet, their_text_encoder),
        separate_outputs(unet, text_encoder),
        strict=True,
    ):
        require_same_forward(found, theirs, base)
