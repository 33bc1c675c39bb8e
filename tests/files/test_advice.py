"""Every option that an error of the files half names: given as the error says, the same call succeeds."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import FileError, PeftkitError
from tests.support.zoo import train

#: what fails, and with which options it succeeds
Case = tuple[Callable[..., Any], dict[str, Any]]


def net(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 8), nn.Linear(8, 8))


def adapted(kind: str = "lora", model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = net() if model is None else model
    pk.wrap(model, kind, **({"rank": 2} if kind in ("lora", "dora", "lokr") else {}), **options)
    train(model)
    return model


def base(folder: Path, weights: dict[str, Tensor] | None = None, name: str = "base.safetensors") -> Path:
    save_file(net().state_dict() if weights is None else weights, folder / name)
    return folder / name


def lora(folder: Path, *names: str, **more: Tensor) -> Path:
    tensors = {f"{name}.lora_up.weight": torch.ones(8, 2) for name in names}
    tensors |= {f"{name}.lora_down.weight": torch.ones(2, 8) for name in names}
    save_file({**tensors, **{key.replace("__", "."): tensor for key, tensor in more.items()}}, folder / "a.safetensors")
    return folder / "a.safetensors"


def _allow_pickle(folder: Path) -> Case:
    torch.save({"x.lora_up.weight": torch.ones(8, 2), "x.lora_down.weight": torch.ones(2, 8)}, folder / "a.pt")
    return lambda **how: pk.inspect(folder / "a.pt", **how), {"allow_pickle": True}


def _allow_zero(folder: Path) -> Case:
    model = net()
    pk.wrap(model, "lora", rank=2)
    return lambda **how: pk.save(model, folder / "a.safetensors", **how), {"allow_zero": True}


def _alpha(folder: Path) -> Case:
    keys = {"base_model.model.x.lora_A.weight": torch.ones(2, 8), "base_model.model.x.lora_B.weight": torch.ones(8, 2)}
    save_file(keys, folder / "a.safetensors")
    return lambda **how: pk.inspect(folder / "a.safetensors", **how), {"alpha": "rank"}


def _alpha_zero(folder: Path) -> Case:
    path = lora(folder, "lora_unet_x", lora_unet_x__alpha=torch.tensor(0.0))
    return lambda **how: pk.inspect(path, **how), {"alpha_zero": "rank"}


def _base(folder: Path) -> Case:
    path = pk.save(adapted("dora"), folder / "a.safetensors")
    return lambda **how: pk.diff(path, path, **how), {"base": base(folder)}


def _component(folder: Path) -> Case:
    whole = folder / "pipeline"
    for part in ("transformer", "transformer_2"):
        (whole / part).mkdir(parents=True)
        base(whole / part, {"blocks.0.q.weight": torch.ones(8, 8)}, "diffusion_pytorch_model.safetensors")
    (whole / "model_index.json").write_text('{"transformer": ["a", "b"], "transformer_2": ["a", "b"]}')
    path = lora(folder, "lora_unet_blocks_0_q")
    return lambda **how: pk.plan_merge(whole, {path: 1.0}, **how), {"component": "transformer_2"}


def _dora_axis(folder: Path) -> Case:
    path = lora(folder, "lora_unet_x", lora_unet_x__dora_scale=torch.ones(8))
    return lambda **how: pk.inspect(path, **how), {"dora_axis": "out"}


def _dtype(folder: Path) -> Case:
    weights = {"x.weight": torch.ones(8, 8).to(torch.float8_e4m3fn), "x.scale_weight": torch.ones(())}
    where, path = base(folder, weights), lora(folder, "lora_unet_x")
    out = folder / "out.safetensors"
    return lambda **how: pk.merge_checkpoint(where, {path: 1.0}, out, **how), {"dtype": torch.bfloat16}


def _extras(folder: Path) -> Case:
    model = adapted(targets="0")
    model[1].bias.requires_grad_(True)  # type: ignore[index]
    with torch.no_grad():
        model[1].bias.add_(1)  # type: ignore[index]
    out = folder / "out.safetensors"
    return lambda **how: pk.export(model, out, "comfyui", family="own", **how), {"extras": False}


def _family(folder: Path) -> Case:
    save_file(
        {"stages.0.q.lora_up.weight": torch.ones(8, 2), "stages.0.q.lora_down.weight": torch.ones(2, 8)}, folder / "a"
    )
    path = (folder / "a").rename(folder / "a.safetensors")
    return lambda **how: pk.export(path, folder / "out.safetensors", "comfyui", **how), {"family": "own"}


def _ignore(folder: Path) -> Case:
    path = lora(folder, "lora_unet_x", something__else=torch.ones(3))
    return lambda **how: pk.inspect(path, **how), {"ignore": "something*"}


def _name(folder: Path) -> Case:
    model = adapted(name="style", targets="0")
    pk.wrap(model, "lora", rank=2, name="face", targets="1")
    torch.save(model.state_dict(), folder / "whole.pt")

    def load(**how: Any) -> None:
        twin = net()
        pk.wrap(twin, "lora", rank=2, name="style", targets="0")
        pk.wrap(twin, "lora", rank=2, name="face", targets="1")
        pk.load(twin, folder / "whole.pt", allow_pickle=True, **how)

    return load, {"name": "style"}


def _origin(folder: Path) -> Case:
    path = pk.save(adapted("dora"), folder / "a.safetensors")
    where, out = base(folder), folder / "out.safetensors"
    return lambda **how: pk.merge_checkpoint(where, {path: 1.0}, out, rebase="transplant", **how), {"origin": where}


def _other_base(folder: Path) -> Case:
    path, other = pk.save(adapted(), folder / "a.safetensors"), net()
    with torch.no_grad():
        other[0].weight.mul_(2)
    return lambda **how: pk.load(other, path, **how), {"other_base": True}


def _overwrite(folder: Path) -> Case:
    path = pk.save(adapted(), folder / "a.safetensors")
    return lambda **how: pk.rescale(path, 0.5, path, **how), {"overwrite": True}


def _rank(folder: Path) -> Case:
    path, other = (pk.save(adapted(), folder / f"{name}.safetensors") for name in "ab")
    out = folder / "out.safetensors"
    return lambda **how: pk.combine({path: 1.0, other: 0.5}, out, method="svd", **how), {"rank": 2}


def _rename(folder: Path) -> Case:
    path, where = lora(folder, "lora_unet_blocks_0_query"), base(folder, {"blocks.0.q.weight": torch.ones(8, 8)})
    rule = {"lora_unet_blocks_0_query": "blocks.0.q"}
    return lambda **how: pk.plan_merge(where, {path: 1.0}, **how), {"rename": rule}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def _tied(folder: Path) -> Case:
    path = pk.save(adapted(model=Tied(), targets="one", tied="untie"), folder / "a.safetensors")
    return lambda **how: pk.load(Tied(), path, other_base=True, **how), {"tied": "share"}


def _variant(folder: Path) -> Case:
    where = folder / "model"
    where.mkdir()
    for variant in ("fp16", "bf16"):
        base(where, name=f"model.{variant}.safetensors")
    path = pk.save(adapted(), folder / "a.safetensors")
    return lambda **how: pk.plan_merge(where, {path: 1.0}, **how), {"variant": "fp16"}


CASES: dict[str, Callable[[Path], Case]] = {
    name.removeprefix("_"): case
    for name, case in list(globals().items())
    if re.fullmatch(r"_[a-z_]+[a-z]", name) and getattr(case, "__annotations__", {}).get("return") == "Case"
}
#: options in messages that say what came, or whose advice is followed where what they need is at hand
ELSEWHERE = {
    *("push", "card"),  # tests/files/test_hub.py
    "config",  # tests/files/export/test_llamacpp.py
    *("into", "backup"),  # tests/wrapping/test_quantised_merge.py, tests/files/formats/test_peft_experts.py
    *("energy", "method"),  # the other of `rank`, and what asked for it
    *("portable", "assign"),  # tests/adapters/test_loldu.py; of torch's load_state_dict
    *("training", "path"),  # what came
    *("init_lora_weights", "init_weights", "use_dora", "block_share"),  # of PEFT's configuration
    *("save_projection", "weight_tying"),  # of PEFT's too: tests/files/formats/test_peft_shared.py
}


@pytest.mark.parametrize("option", sorted(CASES))
@pytest.mark.filterwarnings("ignore")
def test_the_option_that_an_error_names_is_the_way_on(option: str, tmp_path: Path) -> None:
    call, advice = CASES[option](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PeftkitError, match=rf"\b{option}=") as refused:
        call()
    assert sorted(tmp_path.rglob("*")) == before, refused.value
    call(**advice)


def test_a_pickle_under_another_name_is_read_under_the_one_that_the_error_says(tmp_path: Path) -> None:
    torch.save(
        {"x.lora_up.weight": torch.ones(8, 2), "x.lora_down.weight": torch.ones(2, 8)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(FileError, match=r"allow_pickle=True, under a name such as a\.pt$"):
        pk.inspect(tmp_path / "a.safetensors", allow_pickle=True)
    (tmp_path / "a.safetensors").rename(tmp_path / "a.pt")
    assert pk.inspect(tmp_path / "a.pt", allow_pickle=True).modules


def test_every_option_that_an_error_names_is_tried() -> None:
    named: set[str] = set()
    for file in sorted(Path(pk.__file__).parent.joinpath("files").rglob("*.py")):
        tree = ast.parse(file.read_text())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        said = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and _has_text(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
                named |= set(re.findall(r"(?<![\w.\-])([a-z_]{3,})=(?!=)", node.value))
    assert named == {*CASES, *ELSEWHERE}


def _has_text(node: Any) -> bool:
    return bool(node.body) and isinstance(node.body[0], ast.Expr)
