"""Model classes that people train, in small: wrapped, trained, saved, loaded and merged by the same few lines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import LostAdapterError
from tests.support.zoo import train

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@dataclass(frozen=True)
class Published:
    """A model class: how it is made, an input, and what of it is read by code that does not call its layer."""

    make: Callable[[], nn.Module]
    inputs: Mapping[str, Any]
    reads: tuple[str, ...] = ()
    #: layers that the output does not depend on
    unused: tuple[str, ...] = ("pooler.",)
    output: Callable[[Any], Tensor] = field(default=lambda out: out[0])


def transformers(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers as library

        return getattr(library, name)(getattr(library, config)(**options))

    return make


def diffusers(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import diffusers as library

        return getattr(library, name)(**options)

    return make


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


HIDDEN = {"hidden_size": 16, "num_hidden_layers": 2}
SMALL = {**HIDDEN, "vocab_size": 32}
ATTENTION = {"num_attention_heads": 2, "intermediate_size": 24}
DECODER = {**SMALL, **ATTENTION, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
STATE_SPACE = {**SMALL, "state_size": 4, "expand": 2, "conv_kernel": 2, "pad_token_id": 0}
BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}

MODELS = {
    "Llama": Published(transformers("LlamaForCausalLM", "LlamaConfig", **DECODER), {"input_ids": TOKENS}),
    "Qwen3": Published(transformers("Qwen3ForCausalLM", "Qwen3Config", **DECODER), {"input_ids": TOKENS}),
    "GPT-2": Published(
        transformers("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, vocab_size=32),
        {"input_ids": TOKENS},
    ),
    "BERT": Published(transformers("BertModel", "BertConfig", **SMALL, **ATTENTION), {"input_ids": TOKENS}),
    "ViT": Published(
        transformers("ViTModel", "ViTConfig", **HIDDEN, **ATTENTION, image_size=8, patch_size=4),
        {"pixel_values": _noise(1, 3, 8, 8)},
    ),
    "T5": Published(
        transformers(
            "T5ForConditionalGeneration", "T5Config", d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            vocab_size=32,
        ),
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS},
    ),
    "Mamba": Published(
        transformers("MambaForCausalLM", "MambaConfig", **STATE_SPACE, time_step_rank=2),
        {"input_ids": TOKENS},
        reads=("*.conv1d", "*.dt_proj"),
    ),
    "ConvNeXt": Published(
        transformers("ConvNextModel", "ConvNextConfig", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
        {"pixel_values": _noise(1, 3, 16, 16)},
    ),
    "ResNet": Published(
        transformers("ResNetModel", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        {"pixel_values": _noise(2, 3, 16, 16)},
    ),
    "Wav2Vec2": Published(
        transformers(
            "Wav2Vec2Model", "Wav2Vec2Config", hidden_size=16, num_hidden_layers=2, **ATTENTION, conv_dim=(8, 8),
            conv_stride=(4, 2), conv_kernel=(4, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, layerdrop=0.0, apply_spec_augment=False,
        ),
        {"input_values": _noise(1, 256)},
    ),
    "UNet": Published(
        diffusers(
            "UNet2DConditionModel", **BLOCKS, sample_size=8, cross_attention_dim=8, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        {"sample": _noise(1, 4, 8, 8), "timestep": 5, "encoder_hidden_states": _noise(1, 3, 8)},
    ),
    "VAE": Published(
        diffusers(
            "AutoencoderKL", **BLOCKS, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        {"sample": _noise(1, 3, 8, 8)},
    ),
}  # fmt: skip


def _made(model: Published) -> nn.Module:
    torch.manual_seed(0)
    return model.make().eval()


def _wrap(net: nn.Module, model: Published, kind: str) -> None:
    options = {"rank": 2} if kind != "lokr" else {"factor": 2}
    rules = [pk.Rule(pattern, kind, read=True, **options) for pattern in model.reads]
    with torch.no_grad():
        pk.wrap(net, rules=[*rules, pk.Rule("full", kind, **options)])


def _loss(output: Tensor) -> Tensor:
    """A sum with random weights: one of squares is constant after a norm."""
    return (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(5))).sum()


def _run(net: nn.Module, model: Published) -> Tensor:
    return model.output(net(**model.inputs, return_dict=False))


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_saves_loads_and_merges(name: str, kind: str, tmp_path: Path) -> None:
    model = MODELS[name]
    net = _made(model)
    base = copy.deepcopy(net)
    before = _run(net, model).detach()
    _wrap(net, model, kind)
    assert torch.equal(_run(net, model), before) or (_run(net, model) - before).norm() <= 1e-5 * before.norm()
    train(net, size=0.05)
    tuned = _run(net, model)
    _loss(tuned).backward()
    still = {n for n, p in net.named_parameters() if p.requires_grad and p.grad is None}
    assert still == {n for n in still if n.startswith(model.unused)}
    assert (tuned - before).norm() > 1e-4 * before.norm()
    pk.save(net, tmp_path / "adapter.safetensors")
    pk.load(base, tmp_path / "adapter.safetensors")
    base.eval()
    assert torch.equal(_run(base, model), tuned)
    pk.merge(net)
    assert (_run(net, model) - tuned).norm() <= 1e-4 * tuned.norm()
    pk.unwrap(net, keep_merged=True)
    assert (_run(net, model) - tuned).norm() <= 1e-4 * tuned.norm()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["Llama", "T5", "ViT", "Wav2Vec2"])
def test_gradient_checkpointing_of_transformers_gives_the_gradients_it_gives_without(
    name: str, reentrant: bool
) -> None:
    model = MODELS[name]
    net = _made(model)
    _wrap(net, model, "lora")
    train(net, size=0.05)

    def gradients() -> list[Tensor]:
        net.zero_grad()
        torch.manual_seed(4)  # dropout draws the same in both
        _loss(_run(net, model)).backward()
        return [p.grad.clone() for p in pk.adapter_parameters(net) if p.grad is not None]

    net.train()
    plain = gradients()
    net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    net.enable_input_require_grads()
    checkpointed = gradients()
    used = [n for n, p in net.named_parameters() if p.requires_grad and not n.startswith(model.unused)]
    assert len(checkpointed) == len(plain) == len(used)
    for ours, theirs in zip(checkpointed, plain, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9


def test_fused_projections_lose_no_adapter_in_silence(tmp_path: Path) -> None:
    net = _made(MODELS["UNet"])
    pk.wrap(net, "lora", rank=2, targets="attn-only")
    train(net)
    net.fuse_qkv_projections()
    for verb in (lambda: pk.save(net, tmp_path / "lost.safetensors"), lambda: pk.merge(net)):
        with pytest.raises(LostAdapterError, match=r"to_k?q?k?v has come.*to_k copied"):
            verb()
    assert not list(tmp_path.iterdir())
    # what the error advises
    net.unfuse_qkv_projections()
    for module in net.modules():
        for fused in [name for name in ("to_qkv", "to_kv") if hasattr(module, name)]:
            delattr(module, fused)
    tuned = _run(net, MODELS["UNet"]).detach()
    pk.save(net, tmp_path / "kept.safetensors")
    pk.merge(net)
    net.fuse_qkv_projections()
    assert (_run(net, MODELS["UNet"]) - tuned).norm() <= 1e-5 * tuned.norm()


def test_new_tokens_after_wrap_lose_no_adapter_of_the_head_in_silence(tmp_path: Path) -> None:
    net = _made(MODELS["Llama"])
    pk.wrap(net, "lora", rank=2, targets=["attn-mlp", "lm_head"])
    train(net)
    net.resize_token_embeddings(40)
    with pytest.raises(LostAdapterError, match="lm_head"):
        pk.save(net, tmp_path / "lost.safetensors")
    pk.wrap(net, "lora", rank=2, targets="lm_head")  # what the error advises
    pk.save(net, tmp_path / "found.safetensors")


def test_save_pretrained_of_a_wrapped_model_keeps_the_base_and_the_adapter_comes_out(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = MODELS["Llama"]
    net = _made(model)
    before = _run(net, model).detach()
    _wrap(net, model, "lora")
    train(net)
    tuned = _run(net, model).detach()
    net.save_pretrained(tmp_path)
    base, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    base.eval()
    assert torch.equal(_run(base, model), before)
    assert report["unexpected_keys"] and not report["missing_keys"]  # transformers says that it left the adapters out
    _wrap(base, model, "lora")
    pk.load(base, tmp_path / "model.safetensors")
    assert torch.equal(_run(base, model), tuned)


def test_ema_of_diffusers_follows_the_adapters() -> None:
    from diffusers.training_utils import EMAModel

    model = MODELS["UNet"]
    net = _made(model)
    _wrap(net, model, "dora")
    train(net, size=0.05)
    ema = EMAModel(pk.adapter_parameters(net), decay=0.0, update_after_step=-1)
    first = _run(net, model).detach()
    train(net, seed=3, size=0.05)
    second = _run(net, model).detach()
    ema.store(pk.adapter_parameters(net))
    ema.copy_to(pk.adapter_parameters(net))
    assert torch.equal(_run(net, model), first)
    ema.restore(pk.adapter_parameters(net))
    assert torch.equal(_run(net, model), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", ["lora", "lokr", "dora", "loha", "full"])
def test_an_adapter_for_each_sample_of_a_batch(kind: str) -> None:
    """torch.func over stacked parameters: sample i of the batch goes through adapter i."""
    nets = []
    for seed in range(3):
        torch.manual_seed(0)
        nets.append(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)))
        pk.wrap(nets[-1], kind)
        train(nets[-1], seed=seed)
    x = _noise(3, 5, 8)
    expected = torch.stack([net(sample) for net, sample in zip(nets, x, strict=True)])
    parameters, buffers = torch.func.stack_module_state(nets)

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(nets[0], (parameters, buffers), (sample,))

    found = torch.vmap(one)(parameters, buffers, x)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
