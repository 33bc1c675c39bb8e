"""Weights that are read without calling their layer: nn.MultiheadAttention and nn.TransformerEncoderLayer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import UnsupportedLayerError
from tests.support.laws import bits
from tests.support.zoo import train

KINDS = {
    "lora": {"rank": 2},
    "loha": {"rank": 2},
    "lokr": {"factor": 2},
    "loldu": {"rank": 2},
    "dora": {"rank": 2},
    "oft": {"block_size": 4},
}


class Block(nn.Module):
    """Cross-attention with its own sizes of key and value, or self-attention."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
        self.k, self.v = sizes.get("kdim", 8), sizes.get("vdim", 8)

    def forward(self, x: Tensor) -> Tensor:
        key = x.repeat(1, 1, -(-self.k // 8))[..., : self.k]
        value = x.repeat(1, 1, -(-self.v // 8))[..., : self.v]
        return self.attn(x, key, value, need_weights=False)[0]


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 4, "vdim": 12}], ids=["fused", "separate"])
@pytest.mark.parametrize("kind", KINDS)
def test_multihead_attention(kind: str, sizes: dict[str, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    block = Block(sizes).double()
    before, keys, state = block(X), list(block.state_dict()), {k: bits(v) for k, v in block.state_dict().items()}
    plan = pk.wrap(block, kind, **KINDS[kind])
    assert plan.modules == ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj")
    assert torch.equal(block(X), before)
    assert [k for k in block.state_dict() if "adapters" not in k] == keys
    assert pk.check(block, X).ok
    train(block)
    wrapped = block(X)
    assert not torch.equal(wrapped, before)
    block.eval()
    with torch.no_grad():
        torch.testing.assert_close(block(X), wrapped, rtol=1e-12, atol=1e-12)
    block.train()
    fresh = Block(sizes).double()
    fresh.load_state_dict({k: v for k, v in block.state_dict().items() if "adapters" not in k})
    pk.load(fresh, pk.save(block, tmp_path / "a.safetensors"))
    assert torch.equal(fresh(X), wrapped)
    assert torch.equal(copy.deepcopy(block)(X), wrapped)
    for strength in (-1.0, 0.5):
        pk.set_strength(block, strength)
        wrapped = block(X)
        pk.merge(block)
        torch.testing.assert_close(block(X), wrapped, rtol=1e-12, atol=1e-12)
        pk.restore(block)
    pk.unwrap(block)
    assert {k: bits(v) for k, v in block.state_dict().items()} == state
    assert type(block.attn) is nn.MultiheadAttention
    assert torch.equal(block(X), before)


def test_a_slice_of_the_fused_projection_leaves_the_others_alone() -> None:
    torch.manual_seed(0)
    block = Block({}).double()
    assert pk.wrap(block, "lora", targets="*.k_proj", rank=2).modules == ("attn.k_proj",)
    train(block)
    before = block.attn._parameters["in_proj_weight"].detach().clone()
    pk.wrap(block, "oft", targets=["attn.k_proj", "attn.v_proj"], block_size=2, name="second")
    train(block, name="second")
    wrapped = block(X)
    assert torch.equal(block.attn.in_proj_weight[:8], before[:8])
    assert not torch.equal(block.attn.in_proj_weight[8:16], before[8:16])
    pk.merge(block, "default")
    torch.testing.assert_close(block(X), wrapped, rtol=1e-12, atol=1e-12)
    pk.restore(block)
    assert torch.equal(block.attn._parameters["in_proj_weight"], before)
    torch.testing.assert_close(block(X), wrapped, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
def test_the_fused_inference_path_of_an_encoder_layer_sees_the_adapters() -> None:
    """In eval mode without gradients torch reads linear1.weight and never calls linear1."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    x = X.float()
    pk.wrap(encoder, "lora", rank=2)
    train(encoder)
    encoder.eval()
    slow = encoder(x)
    with torch.no_grad():
        fast = encoder(x)
        with pk.disabled(encoder):
            base = encoder(x)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    assert (fast - base).abs().max() > 1e-2


def test_input_dropout_cannot_act_where_no_input_is_seen() -> None:
    block = Block({})
    with pytest.raises(UnsupportedLayerError, match="rank_dropout"):
        pk.wrap(block, "lora", dropout=0.1)
    pk.wrap(block, "lora", rank_dropout=0.1, targets="*.q_proj")
