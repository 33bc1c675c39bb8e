"""Networks for kohya's sd-scripts: its calls, its names and its arguments."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from peftkit.errors import FileError, MismatchError, OptionError
from peftkit.integrations import kohya
from peftkit.integrations.kohya_blocks import SD, SDXL, block_of, block_rates
from peftkit.wrapping.installed import installed_adapters
from tests.support.readers import READERS
from tests.support.sd_scripts import Flux, Run, SdxlUNet2DConditionModel, T5EncoderModel, clip, train

Models = tuple[list[nn.Module], nn.Module]
TOKENS = torch.tensor([[1, 5, 6, 2]])


def sd15() -> Models:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return [clip()], unet


def sdxl() -> Models:
    torch.manual_seed(0)
    return [clip(1), clip(2)], SdxlUNet2DConditionModel()


def flux() -> Models:
    torch.manual_seed(0)
    return [clip(1), T5EncoderModel()], Flux()


def output(models: Models) -> Tensor:
    """What the denoiser makes of noise and of what the encoders make of a prompt."""
    encoders, unet = models
    torch.manual_seed(3)
    made = [encoder(TOKENS) for encoder in encoders]
    context = sum(each if isinstance(each, Tensor) else each.last_hidden_state for each in made)
    dtype = next(unet.parameters()).dtype
    if isinstance(unet, UNet2DConditionModel):
        return unet(torch.randn(1, 4, 8, 8, dtype=dtype), torch.tensor(5), context.to(dtype)).sample
    return unet(torch.randn(1, 8, 4, 4, dtype=dtype), context.to(dtype))


def loss_of(models: Models) -> Callable[[], Tensor]:
    return lambda: (output(models).float() - 1).square().mean()


CASES: dict[str, tuple[Callable[[], Models], set[str], str]] = {
    "sd15": (
        sd15,
        {"lora_unet", "lora_te"},
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
    ),
    "sdxl": (
        sdxl,
        {"lora_unet", "lora_te1", "lora_te2"},
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight",
    ),
    "flux": (flux, {"lora_unet", "lora_te1"}, "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_trains_saves_resumes_and_merges(case: str, tmp_path: Path) -> None:
    make, prefixes, key = CASES[case]
    models, path = make(), tmp_path / "out.safetensors"
    before = output(make())
    network = train(Run(output=path), *models, loss_of(models))
    network.eval()
    trained = output(models)
    assert not torch.equal(trained, before)
    tensors = load_file(path)
    assert {"_".join(name.split("_")[:2]) for name in tensors} == prefixes
    assert key in tensors
    assert not any("encoder" in name and "text_model" not in name for name in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "4" and file.metadata()["sshs_model_hash"]
    ids = {id(p) for p in network.parameters()}
    assert {id(p) for part in (*models[0], models[1]) for p in part.parameters() if p.requires_grad} == ids

    again = make()
    train(Run(network_weights=path, steps=0), *again, loss_of(again)).eval()
    torch.testing.assert_close(output(again), trained)
    again = make()
    train(Run(network_weights=path, dim_from_weights=True, steps=0), *again, loss_of(again)).eval()
    torch.testing.assert_close(output(again), trained)

    merged = make()
    module, weights = kohya.create_network_from_weights(1.0, path, None, merged[0], merged[1], for_inference=True)
    assert module.is_mergeable()
    module.merge_to(merged[0], merged[1], weights, torch.float32, "cpu")
    torch.testing.assert_close(output(merged), trained, rtol=1e-4, atol=1e-5)
    assert not [name for name, _ in merged[1].named_parameters() if "adapters" in name]


@pytest.mark.parametrize("program", ["kohya", "comfyui", "a1111", "forge"])
def test_programs_read_what_was_trained(program: str, tmp_path: Path) -> None:
    models, path = sd15(), tmp_path / "out.safetensors"
    network = train(Run(output=path), *models, loss_of(models))
    weights, expected = {}, {}
    for at in installed_adapters(network.base):
        part, _, rest = at.site.partition(".")
        level = "text_model." if part == "text_encoder" and not rest.startswith("text_model.") else ""
        weights[f"{part}.{level}{rest}"] = at.host.weight_of(at.slot).detach()
        expected[f"{part}.{level}{rest}"] = at.adapter(at.base, 1.0).dense().detach()
    found = READERS[program](path, weights, "sd15", 1.0)
    assert not found.ignored and set(found.deltas) == set(expected)
    for name, delta in expected.items():
        torch.testing.assert_close(found.deltas[name].flatten(1).float(), delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind, options", [("lokr", ["factor=2"]), ("loha", []), ("dora", []), ("full", [])])
def test_other_kinds_by_network_args(kind: str, options: list[str], tmp_path: Path) -> None:
    models, path = sdxl(), tmp_path / "out.safetensors"
    network = train(Run(network_args=[f"kind={kind}", *options], output=path), *models, loss_of(models))
    assert {adapter.kind for adapter in network.adapters.values()} == {kind}
    again = sdxl()
    train(Run(network_weights=path, dim_from_weights=True, steps=0), *again, loss_of(again)).eval()
    network.eval()
    torch.testing.assert_close(output(again), output(models), rtol=1e-4, atol=1e-5)


def test_the_layers_are_those_of_sd_scripts() -> None:
    models = sd15()
    network = kohya.create_network(1.0, 4, 1, None, *models[0], models[1])
    network.apply_to(*models)
    names = set(network.adapters)
    assert not any("resnets" in name or "conv_in" in name or "time_emb" in name for name in names)
    assert any(name.endswith("_proj_in") for name in names) and any("mlp_fc1" in name for name in names)
    models = sd15()
    network = kohya.create_network(1.0, 4, 1, None, *models[0], models[1], conv_dim="2", conv_alpha="1")
    network.apply_to(*models)
    conv = network.adapters["lora_unet_down_blocks_0_resnets_0_conv1"]
    assert conv.options["rank"] == 2
    assert set(network.adapters) > names


def test_only_what_is_trained_has_adapters_and_what_is_asked_for_by_targets() -> None:
    models = sdxl()
    network = train(Run(train_text_encoder=False, steps=1), *models, loss_of(models))
    assert all(name.startswith("lora_unet") for name in network.adapters)
    models = sdxl()
    network = train(Run(network_args=["targets=*.to_q,*.to_k"], steps=1), *models, loss_of(models))
    assert {name[-4:] for name in network.adapters} == {"to_q", "to_k"}
    models = flux()
    network = train(Run(network_args=["train_t5xxl=True"], steps=1), *models, loss_of(models))
    assert network.train_t5xxl and "lora_te3_encoder_block_0_q" in network.adapters


def test_learning_rates_of_parts_and_blocks_and_of_lora_plus() -> None:
    models = sdxl()
    down = ",".join("0" if i == 4 else "1" for i in range(9))
    arguments = [f"down_lr_weight={down}", "mid_lr_weight=1,.5,1", "loraplus_unet_lr_ratio=4"]
    network = train(
        Run(network_args=arguments, text_encoder_lr=[1e-3, 0], unet_lr=1e-2, steps=1), *models, loss_of(models)
    )
    assert not any("input_blocks_4" in name for name in network.adapters), "a rate of 0 trains nothing"
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs([1e-3, 0], 1e-2, 1.0)
    rates = dict(zip(descriptions, [group["lr"] for group in groups], strict=True))
    assert rates == {"textencoder": 1e-3, "unet_block11": 5e-3, "unet_block11 plus": 2e-2}
    by_default, _ = network.prepare_optimizer_params(None, None, 1e-4)
    assert {group["lr"] for group in by_default} == {1e-4, 5e-5, 2e-4}


def test_ranks_by_block() -> None:
    models = sdxl()
    dims = ",".join(str(i) for i in range(23))
    network = kohya.create_network(1.0, 4, 1, None, *models, block_dims=dims, block_alphas=dims)
    network.apply_to(*models)
    assert network.adapters["lora_unet_input_blocks_4_1_proj_in"].options["rank"] == 5
    assert network.adapters["lora_unet_middle_block_1_proj_in"].options["alpha"] == 11


@pytest.mark.parametrize("full", [False, True])
def test_a_base_in_16_bits_leaves_the_adapters_in_32(full: bool, tmp_path: Path) -> None:
    first, path = flux(), tmp_path / "first.safetensors"
    train(Run(output=path), *first, loss_of(first))
    models = flux()
    run = Run(weight_dtype=torch.bfloat16, full_bf16=full, network_weights=path, steps=0)
    network = train(run, *models, loss_of(models))
    assert next(models[1].txt_in.parameters()).dtype is torch.bfloat16
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16 if full else torch.float32}
    if not full:  # also the numbers were not rounded on the way
        exact = load_file(path)["lora_unet_single_blocks_0_linear1.lora_down.weight"]
        assert torch.equal(network.adapters["lora_unet_single_blocks_0_linear1"].down, exact)
    run = Run(weight_dtype=torch.bfloat16, full_bf16=full, output=tmp_path / "out.safetensors")
    models = flux()
    train(run, *models, loss_of(models))
    assert load_file(tmp_path / "out.safetensors")[CASES["flux"][2]].dtype is torch.bfloat16


def test_a_base_in_16_bits_leaves_the_norms_of_dora_as_they_were() -> None:
    models, plain = sdxl(), sdxl()
    network = train(Run(network_args=["kind=dora"], weight_dtype=torch.bfloat16, steps=0), *models, loss_of(models))
    assert {buffer.dtype for buffer in network.buffers()} == {torch.float32}
    for part in (*plain[0], plain[1]):
        part.to(torch.bfloat16).eval()
    assert torch.equal(output(models), output(plain)), "a fresh adapter changes nothing"


def test_strength_norms_dropout_and_merged_base_weights(tmp_path: Path) -> None:
    models, path = sdxl(), tmp_path / "out.safetensors"
    start = output(sdxl())
    network = train(Run(output=path, scale_weight_norms=0.05), *models, loss_of(models))
    network.eval()
    full = output(models)
    network.set_multiplier(0.0)
    assert torch.equal(output(models), start)
    network.set_multiplier(1.0)
    network.set_enabled(False)
    assert torch.equal(output(models), start)
    network.set_enabled(True)
    assert torch.equal(output(models), full)
    based = sdxl()
    network = train(Run(base_weights=[path], network_dropout=0.5), *based, loss_of(based))
    assert output(based).isfinite().all()
    network.on_epoch_start(None, None)
    dropped = output(based)
    network.eval()
    assert not torch.equal(output(based), dropped), "dropout acts in models that are in eval mode"


@pytest.mark.parametrize(
    "arguments, error, what",
    [
        ({"factor": "x"}, OptionError, "factor"),
        ({"kind": "lokr", "factors": "2"}, OptionError, "factors"),
        ({"down_lr_weight": "1,2"}, OptionError, "9 numbers"),
        ({"block_dims": "1,2"}, OptionError, "23 numbers, one for each block"),
        ({"conv_dim": "many"}, OptionError, "conv_dim='many'"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: dict[str, Any], error: type[Exception], what: str) -> None:
    models = sdxl()
    with pytest.raises(error, match=what):
        kohya.create_network(1.0, 4, 1, None, *models, **arguments).apply_to(*models)
    assert not any("adapters" in name for name, _ in models[1].named_parameters())


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    models, path = sdxl(), tmp_path / "out.safetensors"
    network = train(Run(output=path, network_dim=8), *models, loss_of(models))
    with pytest.raises(FileError, match="safetensors"):
        network.save_weights(tmp_path / "out.ckpt", None, None)
    with pytest.raises(FileError, match="expected"):
        kohya.create_network_from_weights(1.0, None, None, *models)
    models = sdxl()
    with pytest.raises(MismatchError, match="unwrap that adapter"):
        train(Run(network_weights=path, network_dim=4), *models, loss_of(models))
    models = sdxl()
    run = Run(network_weights=path, dim_from_weights=True, network_args=["kind=lokr"])
    with pytest.raises(OptionError, match="kind was given"):
        train(run, *models, loss_of(models))


def test_blocks_are_counted_as_sd_scripts_does() -> None:
    assert [block_of(f"down_blocks.{i}.attentions.{j}.x") for i, j in ((0, 0), (2, 1))] == [1, 8]
    assert block_of("down_blocks.1.downsamplers.0.conv") == 6
    assert (block_of("mid_block.attentions.0.x"), block_of("up_blocks.0.resnets.2.x")) == (12, 15)
    assert [block_of(f"{name}.1.x") for name in ("input_blocks", "middle_block", "output_blocks")] == [2, 11, 14]
    assert block_of("conv_in") is None
    rates = block_rates({"down_lr_weight": "linear+.5", "up_lr_weight": "zeros", "block_lr_zero_threshold": ".6"}, SD)
    assert rates is not None and len(rates) == 25 == SD.blocks
    assert rates[:2] == [0.0, 0.0] and rates[11] == 1.5 and rates[12] == 1.0 and rates[13:] == [0.0] * 12
    assert SDXL.blocks == 23 and block_rates({}, SDXL) is None
    json.dumps(rates)
