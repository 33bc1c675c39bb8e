"""A training step of Stable Diffusion's whole U-Net, 282 adapted layers, over the frozen U-Net; and what it keeps.

    python benchmarks/unet.py [--rounds 3] [--latents 32] [--kinds lora,…] [--save]

The architecture is that of SD 1.5 (860M parameters, random weights), batch 1. Every way adapts a model of its own whose
frozen weights are shared. A way that is more than twice as slow as the frozen model takes its turn once; of those that
build ΔW of every layer in every step, LoRA's stands for all.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch

from peftkit.bench import model_step, runner
from peftkit.bench.networks import unet
from peftkit.bench.peers import KINDS
from peftkit.bench.rows import Row
from peftkit.bench.script import Script

#: ways that take four to nine times the frozen model and keep 4 GB: several of them in a process pass 24 GiB
LEFT_OUT = {
    "loha": ("lycoris", "lycoris bypass", "peft"),
    "lokr": ("lycoris", "peft"),
    "dora": ("lycoris",),
    "oft": ("lycoris",),
}


def measure(kind: str, rounds: int, latents: int, threads: int) -> Row:
    """Measure one kind in the process that calls this."""
    torch.set_num_threads(threads)
    runner.prepare("cpu")
    row = model_step.measure(
        unet("sd15", latents),
        kind,
        case=f"SD 1.5 U-Net, 282 layers, latents of {latents}²",
        peers=("lycoris", "peft"),
        rounds=rounds,
        left_out=LEFT_OUT.get(kind, ()),
    )
    return replace(row, question="unet", reference="frozen U-Net")


def main() -> None:
    script = Script(__file__, __doc__, rounds=3, kinds=tuple(KINDS))
    script.parser.add_argument("--latents", type=int, default=32, help="pixels of the latent image each way")
    arguments = script.parse()

    def apart(kind: str) -> Row:
        # A process of its own: what the peers' steps leave of the heap of one kind does not weigh on the next
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(measure, kind, arguments.rounds, arguments.latents, arguments.threads).result()

    script.run([lambda kind=kind: apart(kind) for kind in arguments.kinds])


if __name__ == "__main__":
    main()
