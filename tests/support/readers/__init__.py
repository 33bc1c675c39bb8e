"""One reader per loader: each does with an adapter file what that loader does, right or wrong.

    read = READERS["comfyui"]
    outcome = read(path, weights, "sdxl", strength=0.7)

path
    The safetensors file; for "peft" the directory of adapter_config.json and adapter_model.safetensors.
weights
    The base: canonical module name -> weight, Linear (o, i), Conv (o, i/groups, *k), norm (n,), of any size. With a
    family, canonical names are diffusers' with the pipeline component in front (unet.…, transformer.…,
    text_encoder.…, text_encoder_2.…, text_encoder_3.…); without one, the model's own dotted paths. It must hold every
    module the file adapts, and every part of a fused weight the file names. A bias may be given as `<module>.bias`
    (only PEFT's (IA)³ needs it); every module is taken to have one.
family
    "sd15", "sd2", "sdxl", "sd3", "flux", or None: a generic model, which only lycoris, peft and comfyui accept.
strength
    The user's strength of the adapter.

The reader maps the names of the file to modules as its loader does, patches them in the loader's own layout, and
returns a `Read` in canonical names, in float64:

- `deltas`, `biases`: what changed. A NaN is a value the loader leaves to its random initialisation.
- `ignored`: the keys of the file that had no effect: modules the model lacks, layers the loader skipped, tensors it
  does not know.

`Refused` is raised where the loader rejects the whole file or the generation fails. A ValueError or
NotImplementedError is a question the reader cannot answer, not an answer.

llama.cpp's reader is not among READERS: its base is a GGUF's tensors, under their names there, and its "family" is
llama.cpp's architecture.

The readers share only container (reading), names, model (the loader's layout of the base) and algebra (formulas
every loader agrees on); forge is comfyui's code with its differences, as it is upstream; diffusers uses peft's LoRA.
"""

from __future__ import annotations

from . import a1111, comfyui, diffusers, forge, kohya, lycoris, peft
from .result import Read as Read
from .result import Refused as Refused

READERS = {
    "a1111": a1111.read,
    "forge": forge.read,
    "comfyui": comfyui.read,
    "kohya": kohya.read,
    "lycoris": lycoris.read,
    "diffusers": diffusers.read,
    "peft": peft.read,
}
