"""The layers of real models, each once: what every benchmark runs on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftkit.errors import OptionError
from peftkit.files.families.names import FAMILIES


@dataclass(frozen=True)
class LayerShape:
    """A Linear or a Conv2d by its sizes, with the positions one call of it sees.

    Attributes:
        outputs: m, rows of the weight.
        inputs: columns of a Linear's weight, or channels of a convolution.
        kernel: pixels each way of a convolution's kernel; 0 for a Linear.
        tokens: positions of a Linear's call.
        side: pixels each way of a convolution's image.
        bias: whether the layer has one.
    """

    outputs: int
    inputs: int
    kernel: int = 0
    tokens: int = 512
    side: int = 32
    bias: bool = True

    @classmethod
    def parse(cls, text: str) -> LayerShape:
        """Return the layer that a text describes.

        Args:
            text: OUTxIN@TOKENS for a Linear, OUTxINkKERNEL@SIDE for a convolution.

        Raises:
            OptionError: the text is neither.
        """
        found = re.fullmatch(r"(\d+)x(\d+)(?:k(\d+))?@(\d+)", text)
        sizes = [int(size or 0) for size in found.groups()] if found else []
        if not found or not all((sizes[0], sizes[1], sizes[3])):
            raise OptionError(
                f"{text!r} is no layer: a model, or OUTxIN@TOKENS as 1280x640@512, or OUTxINkKERNEL@SIDE as "
                "320x320k3@64 was expected"
            )
        outputs, inputs, kernel, last = sizes
        return cls(outputs, inputs, kernel, side=last) if kernel else cls(outputs, inputs, tokens=last)

    def layer(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
        """Return the layer, frozen, with the weights PyTorch gives it."""
        where = {"dtype": dtype, "device": device, "bias": self.bias}
        if self.kernel:
            made: nn.Module = nn.Conv2d(self.inputs, self.outputs, self.kernel, padding=self.kernel // 2, **where)
        else:
            made = nn.Linear(self.inputs, self.outputs, **where)
        return made.requires_grad_(False)

    def input(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
        """Return a batch of one for the layer: (tokens, inputs), or (1, inputs, side, side)."""
        size = (1, self.inputs, self.side, self.side) if self.kernel else (self.tokens, self.inputs)
        return torch.randn(size, dtype=dtype, device=device)

    @property
    def columns(self) -> int:
        """n of the weight as a matrix (m, n)."""
        return self.inputs * max(1, self.kernel) ** 2

    @property
    def positions(self) -> int:
        """Output positions of one call."""
        return self.side**2 if self.kernel else self.tokens

    def __str__(self) -> str:
        if self.kernel:
            return f"conv {self.outputs}×{self.inputs} k{self.kernel}, {self.side}²"
        return f"{self.outputs}×{self.inputs}, {self.tokens} tokens"


#: the distinct adapted layers of models, at the tokens or pixels they really see
_DISTINCT: dict[str, tuple[LayerShape, ...]] = {
    # https://huggingface.co/stable-diffusion-v1-5, U-Net at 512²: latents of 64²
    "sd15": (
        LayerShape(320, 320, tokens=4096, bias=False),
        LayerShape(2560, 320, tokens=4096),
        LayerShape(320, 768, tokens=77, bias=False),
        LayerShape(640, 640, tokens=1024, bias=False),
        LayerShape(1280, 1280, tokens=256, bias=False),
        LayerShape(10240, 1280, tokens=256),
        LayerShape(1280, 5120, tokens=256),
        LayerShape(320, 320, kernel=1, side=64),
        LayerShape(320, 320, kernel=3, side=64),
        LayerShape(640, 640, kernel=3, side=32),
        LayerShape(1280, 1280, kernel=1, side=16),
        LayerShape(1280, 1280, kernel=3, side=16),
    ),
    # https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, U-Net at 1024²
    "sdxl": (
        LayerShape(640, 640, tokens=4096, bias=False),
        LayerShape(640, 2048, tokens=77, bias=False),
        LayerShape(1280, 1280, tokens=1024, bias=False),
        LayerShape(1280, 2048, tokens=77, bias=False),
        LayerShape(10240, 1280, tokens=1024),
        LayerShape(1280, 5120, tokens=1024),
        LayerShape(640, 640, kernel=3, side=64),
        LayerShape(1280, 1280, kernel=3, side=32),
    ),
    # https://huggingface.co/black-forest-labs/FLUX.1-dev at 1024²: 4096 image tokens, 512 of text
    "flux": (
        LayerShape(3072, 3072, tokens=4608),
        LayerShape(12288, 3072, tokens=4608),
        LayerShape(3072, 12288, tokens=4608),
        LayerShape(3072, 15360, tokens=4608),
    ),
    # https://huggingface.co/meta-llama/Meta-Llama-3-8B
    "llama": (
        LayerShape(4096, 4096, bias=False),
        LayerShape(1024, 4096, bias=False),
        LayerShape(14336, 4096, bias=False),
        LayerShape(4096, 14336, bias=False),
    ),
    # https://huggingface.co/google/vit-base-patch16-224, one image
    "vit": (
        LayerShape(768, 768, tokens=197),
        LayerShape(3072, 768, tokens=197),
        LayerShape(768, 3072, tokens=197),
        LayerShape(768, 3, kernel=16, side=14),
    ),
    # not a model: sizes that cover the plane of width and tokens
    "square": tuple(LayerShape(size, size, tokens=tokens) for size in (320, 1280, 4096) for tokens in (64, 512, 2048))
    + tuple(LayerShape(c, c, kernel=k, side=side) for c, side in ((320, 64), (1280, 16)) for k in (1, 3)),
}


def sd15_unet() -> list[LayerShape]:
    """Return all 282 layers of SD 1.5's U-Net, with the tokens and pixels of one image of 512²."""
    layers = []
    for module in FAMILIES["sd15"].modules.values():
        if not module.name.startswith("unet.") or len(module.shape) < 2:
            continue
        outputs, inputs = module.shape[:2]
        # The resolution follows the width: 320 channels are seen at 64², 640 at 32², 1280 at 16²
        side = {320: 64, 640: 32, 1280: 16}.get(min(outputs, inputs), 64)
        kernel = module.shape[2] if len(module.shape) == 4 else 0
        layers.append(LayerShape(outputs, inputs, kernel, 77 if inputs == 768 else side**2, side, module.bias))
    return layers


def _distinct(name: str) -> Callable[[], Sequence[LayerShape]]:
    return lambda: _DISTINCT[name]


#: name -> its layers
MODELS: dict[str, Callable[[], Sequence[LayerShape]]] = {
    **{name: _distinct(name) for name in _DISTINCT},
    "sd15-unet": sd15_unet,
}
