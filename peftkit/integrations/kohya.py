"""Adapters in kohya's sd-scripts: `--network_module peftkit.integrations.kohya`.

network_dim and network_alpha are rank and α. network_args are `kind=lokr`, options of the kind (`factor=8`), targets of
`wrap` (`targets=*.to_q,*.to_k`), and sd-scripts' own: conv_dim, conv_alpha, block_dims, block_alphas, conv_block_dims,
conv_block_alphas, down_lr_weight, mid_lr_weight, up_lr_weight, loraplus_lr_ratio, train_t5xxl, ….
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import FileError, OptionError, UnknownAdapterError
from peftkit.files.entries import items_of_model
from peftkit.files.export import metadata as header
from peftkit.files.export import programs
from peftkit.files.export.encode import encode
from peftkit.files.export.tensors import ModuleTensors, shared_alpha, tensors_of
from peftkit.files.formats import container, disk
from peftkit.files.load import LoadReport, load
from peftkit.files.swap import swap
from peftkit.integrations.kohya_blocks import block_of
from peftkit.integrations.kohya_recipe import Recipe
from peftkit.training.limit_norms import limit_norms_
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters
from peftkit.wrapping.merge import merge
from peftkit.wrapping.strength import set_strength
from peftkit.wrapping.wrap import wrap

#: the adapter's name on the models
NAME = "network"


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: nn.Module | Sequence[nn.Module | None] | None,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **arguments: Any,
) -> AdapterNetwork:
    """Make a network as sd-scripts asks for one, which `apply_to` puts on the models.

    Args:
        multiplier: λ.
        network_dim: the rank, 4 by default as in sd-scripts.
        network_alpha: α, 1 by default as in sd-scripts.
        vae: not adapted.
        text_encoder: one, or several in the order of sd-scripts.
        unet: the U-Net or the transformer.
        neuron_dropout: of the layers' inputs, for kinds that have it.
        **arguments: network_args, text by name.

    Raises:
        OptionError: an argument that nothing here knows, or a value that it cannot take.
        UnknownAdapterError: no adapter is called `kind`.
    """
    del vae
    recipe = Recipe(network_dim, network_alpha, neuron_dropout, arguments)
    return AdapterNetwork(text_encoder, unet, multiplier, recipe)


def create_network_from_weights(
    multiplier: float,
    file: str | os.PathLike[str] | None,
    vae: nn.Module | None,
    text_encoder: nn.Module | Sequence[nn.Module | None] | None,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **arguments: Any,
) -> tuple[AdapterNetwork, Mapping[str, Tensor]]:
    """Make a network with the kinds, ranks and numbers of a file; and return the file's tensors, as sd-scripts asks.

    Raises:
        FileError: no file was given, or it is no adapter file.
    """
    del vae, for_inference
    if file is None:
        raise FileError("create_network_from_weights was given tensors and no file, and a file was expected")
    recipe = Recipe(None, None, None, arguments)
    tensors = container.read(Path(file)).tensors() if weights_sd is None else weights_sd
    return AdapterNetwork(text_encoder, unet, multiplier, recipe, Path(file)), tensors


class AdapterNetwork(nn.Module):
    """The adapters of a run of sd-scripts, with the methods that its training loop calls.

    The adapters are also inside the models' layers; the parameters and the state dict here are theirs alone.
    """

    def __init__(
        self,
        text_encoder: nn.Module | Sequence[nn.Module | None] | None,
        unet: nn.Module,
        multiplier: float,
        recipe: Recipe,
        file: Path | None = None,
    ) -> None:
        super().__init__()
        self.multiplier, self.recipe, self.file = multiplier, recipe, file
        self.first_encoder = "lora_te1" if isinstance(text_encoder, Sequence) and len(text_encoder) > 1 else "lora_te"
        self.train_t5xxl = recipe.t5
        self.adapters = nn.ModuleDict()
        # The models are no part of this module: its parameters are what an optimiser and a checkpoint take
        encoders = [text_encoder] if isinstance(text_encoder, nn.Module) else list(text_encoder or ())
        self.__dict__["models"] = nn.ModuleDict(_parts(encoders, unet, recipe.t5))
        self.__dict__["kept"] = {}

    @property
    def base(self) -> nn.ModuleDict:
        """The models that have adapters: "unet", "text_encoder", "text_encoder_2", …."""
        return self.__dict__["models"]

    # -- before training ----------------------------------------------------------------------------------------

    def apply_to(
        self, text_encoder: object, unet: object, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Put the adapters on the models that are to be trained."""
        del text_encoder, unet
        chosen = {
            name: part for name, part in self.base.items() if (apply_unet if name == "unet" else apply_text_encoder)
        }
        self.__dict__["models"] = nn.ModuleDict(chosen)
        if self.file is None:
            wrap(self.base, rules=self.recipe.rules(self.base), name=NAME)
        else:
            self._load(self.file)
        for at in self._installed():
            self.adapters[self._module_name(at.site)] = at.adapter
        self.set_multiplier(self.multiplier)
        self._keep()

    def load_weights(self, file: str | os.PathLike[str]) -> str:
        """Give the adapters the numbers of a file of the same kind; a smaller rank is followed by zeros."""
        report = swap(self.base, file, NAME, component=self._component)
        self._keep()
        return str(report)

    def merge_to(
        self, text_encoder: object, unet: object, weights_sd: object, dtype: object = None, device: object = None
    ) -> None:
        """Merge the file that the network was made from into the models, for good."""
        del text_encoder, unet, weights_sd, dtype, device
        if self.file is None:
            raise UnknownAdapterError("merge_to is of a network of create_network_from_weights, and this one is new")
        if not len(self.adapters):
            self._load(self.file)
            set_strength(self.base, self.multiplier, NAME)
        merge(self.base, NAME, backup=None)
        self.adapters = nn.ModuleDict()

    def is_mergeable(self) -> bool:
        """Return True: every kind with a matrix ΔW can be merged."""
        return True

    def enable_gradient_checkpointing(self) -> None:
        """Do nothing: adapters are inside the models' layers, which are checkpointed with them."""

    def prepare_optimizer_params_with_multiple_te_lrs(
        self,
        text_encoder_lr: float | Sequence[float] | None,
        unet_lr: float | None,
        default_lr: float | None = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return parameter groups with their learning rates, and a description of each.

        Args:
            text_encoder_lr: one for all text encoders, or one for each.
            unet_lr: of the U-Net or the transformer.
            default_lr: where one of them is None. What has a rate of 0 or None is not trained.
        """
        groups: dict[tuple[str, float], list[nn.Parameter]] = {}
        taken: set[nn.Parameter] = set()
        rates = self.recipe.block_rates(self.base)
        for at in self._installed():
            part, _, path = at.site.partition(".")
            rate, what = _rate(part, text_encoder_lr, unet_lr, default_lr)
            block = None if rates is None or part != "unet" else block_of(path)
            if rates is not None and block is not None:
                rate, what = rate * rates[block], f"{what}_block{block}"
            ratio = self.recipe.ratio(part)
            for key, parameter in at.adapter.named_parameters():
                plus = ratio is not None and key in at.adapter.starts_at_zero
                group = (f"{what} plus", rate * ratio) if plus and ratio is not None else (what, rate)
                if group[1] and parameter not in taken:
                    taken.add(parameter)
                    groups.setdefault(group, []).append(parameter)
        self.requires_grad_(True)
        return [{"params": params, "lr": rate} for (_, rate), params in groups.items()], [what for what, _ in groups]

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the same with one learning rate for all text encoders."""
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def prepare_grad_etc(self, text_encoder: object, unet: object) -> None:
        """Make the adapters trainable again, in their own dtype, after the models were frozen and cast around them."""
        del text_encoder, unet
        for key, tensor in self._tensors():
            if key in self.__dict__["kept"]:
                tensor.data = self.__dict__["kept"][key].to(tensor.device)
        self.__dict__["kept"] = {}
        self.requires_grad_(True)

    # -- while training -----------------------------------------------------------------------------------------

    def on_epoch_start(self, text_encoder: object, unet: object) -> None:
        """Put the adapters into training mode, whatever mode the models are in."""
        del text_encoder, unet
        self.train()

    def train(self, mode: bool = True) -> AdapterNetwork:
        """Put the adapters and the layers that they are on into a mode: the layers drop the adapters' inputs."""
        super().train(mode)
        for at in self._installed():
            at.host.training = mode
        return self

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        """Return the adapters' parameters."""
        return self.parameters()

    def set_multiplier(self, multiplier: float) -> None:
        """Set λ."""
        self.multiplier = multiplier
        if len(self.adapters):
            set_strength(self.base, float(multiplier), NAME)

    def set_enabled(self, is_enabled: bool) -> None:
        """Let the adapters act or not."""
        set_strength(self.base, float(self.multiplier) if is_enabled else 0.0, NAME)

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm_value: float, device: object) -> tuple[int, float, float]:
        """Scale every ΔW down to a norm; return how many were, and the mean and the largest norm after it."""
        del device
        limited = limit_norms_(self.base, max_norm_value, NAME)
        norms = [at.adapter(at.base, 1.0).upcast().sqnorm().clamp(min=0).sqrt().item() for at in self._installed()]
        return len(limited), sum(norms) / len(norms), max(norms)

    # -- files --------------------------------------------------------------------------------------------------

    def save_weights(
        self, file: str | os.PathLike[str], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
    ) -> None:
        """Write the adapters under sd-scripts' names, in the structures that ComfyUI reads.

        Args:
            file: *.safetensors.
            dtype: of the tensors.
            metadata: entries of the header.

        Raises:
            FileError: another suffix, or a number that is not finite in that dtype. Nothing is written then.
        """
        path, goal = Path(file), programs.get("comfyui")
        container.require_name(path, "a network (leave out --save_model_as, or name that)")
        pieces = [
            ModuleTensors(self._module_name(item.name), encode(item.adapter, goal, item.shape, item.base), item.shape)
            for item in items_of_model(self.base, NAME)
        ]
        alpha = shared_alpha(pieces)
        tensors = tensors_of(pieces, goal, alpha or 1.0, dtype, path)
        rank = None if alpha is None else int(alpha)
        entries = header.build(tensors, goal, None, path.stem, rank, alpha, metadata or {}, {})
        with disk.atomic(path) as out:
            container.emit(out, tensors, entries)

    # -- parts --------------------------------------------------------------------------------------------------

    @property
    def _component(self) -> str | None:
        """The part of a file that is meant where only the U-Net is trained."""
        return "unet" if set(self.base) == {"unet"} else None

    def _installed(self) -> list[InstalledAdapter]:
        return list(installed_adapters(self.base, [NAME]))

    def _module_name(self, site: str) -> str:
        """The name of a module in files of sd-scripts: "lora_unet_…", "lora_te_…", "lora_te1_…"."""
        part, _, path = site.partition(".")
        prefix = {"unet": "lora_unet", "text_encoder": self.first_encoder}.get(part, f"lora_te{part[-1]}")
        if path.startswith("encoder.layers."):  # transformers 5 leaves a level of CLIP out, which names in files have
            path = f"text_model.{path}"
        return f"{prefix}_{path}".replace(".", "_")

    def _load(self, file: Path) -> LoadReport:
        if self.recipe.given:
            raise OptionError(f"{self.recipe.given[0]} was given, and {file} says by itself what its adapters are")
        return load(self.base, file, NAME, component=self._component)

    def _keep(self) -> None:
        """Keep the adapters' numbers until `prepare_grad_etc`: until then sd-scripts casts the models around them."""
        self.__dict__["kept"] = {key: tensor.detach().clone() for key, tensor in self._tensors()}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The adapters' parameters and buffers: a norm of the base that is rounded is a ΔW."""
        yield from self.adapters.named_parameters()
        yield from self.adapters.named_buffers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterNetwork:
        super()._apply(fn, recurse)  # a cast of the network itself is meant
        self.__dict__["kept"] = {key: fn(tensor) for key, tensor in self.__dict__["kept"].items()}
        return self


def _parts(encoders: Sequence[nn.Module | None], unet: nn.Module, t5: bool) -> dict[str, nn.Module]:
    """The models by the names that the rest of the library has for parts of a pipeline."""
    parts = {"unet": unet}
    for number, encoder in enumerate(encoders, 1):
        if encoder is None:
            continue
        is_t5 = "T5" in type(encoder).__name__
        if is_t5 and not t5:
            continue
        parts["text_encoder_3" if is_t5 else "text_encoder" + (f"_{number}" if number > 1 else "")] = encoder
    return parts


def _rate(
    part: str, text_encoder_lr: float | Sequence[float] | None, unet_lr: float | None, default_lr: float | None
) -> tuple[float, str]:
    """The learning rate of a part, and what a log calls it."""
    if part == "unet":
        return float((unet_lr if unet_lr is not None else default_lr) or 0), "unet"
    number = int(part[-1]) if part[-1].isdigit() else 1
    rates = list(text_encoder_lr) if isinstance(text_encoder_lr, Sequence) else [text_encoder_lr]
    own = rates[min(number, len(rates)) - 1] if rates else None
    return float((own if own is not None else default_lr) or 0), "textencoder" + (f"{number}" if number > 1 else "")
