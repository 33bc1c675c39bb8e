"""A training step of a whole decoder of text, every Linear layer adapted, over the frozen decoder; and what it keeps.

    python benchmarks/transformer.py [--rounds 3] [--layers 4] [--batch 1] [--dtype fp32,bf16] [--kinds lora,…] [--save]

The layers are Llama's (RMS norm, rotary positions, causal attention, gated MLP) with random weights: width 1024, 16
heads, 512 tokens, 7 Linear layers in each. The gradients are of the adapters and of the embedded tokens, so that the
frozen decoder has a backward of its own. Every way adapts a decoder of its own whose frozen weights are shared.
"""

from __future__ import annotations

import torch

from peftkit.bench import model_step
from peftkit.bench.networks import decoder
from peftkit.bench.peers import KINDS, missing
from peftkit.bench.rows import Row
from peftkit.bench.script import Script

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    script = Script(__file__, __doc__, rounds=3, kinds=tuple(KINDS))
    script.parser.add_argument("--layers", type=int, default=4, help="of the decoder")
    script.parser.add_argument("--width", type=int, default=1024, help="of its residual stream, a multiple of 64")
    script.parser.add_argument("--tokens", type=int, default=512, help="of every sequence")
    script.parser.add_argument("--batch", type=int, default=1, help="sequences")
    script.parser.add_argument("--dtype", default="fp32,bf16", help=f"of {','.join(DTYPES)}")
    script.parser.add_argument("--peers", default="", help="compare with these, of lycoris,peft")
    arguments = script.parse()
    peers = [name for name in arguments.peers.split(",") if name]
    dtypes = [name for name in arguments.dtype.split(",") if name]
    if unknown := [name for name in (*dtypes, *peers) if name not in (*DTYPES, "lycoris", "peft")]:
        script.parser.error(f"{unknown[0]}: --dtype takes {', '.join(DTYPES)}, --peers lycoris, peft")
    if lacking := missing(peers):
        script.parser.error(f"--peers {','.join(lacking)}: not installed here")
    layers, width, tokens, batch = arguments.layers, arguments.width, arguments.tokens, arguments.batch
    case = f"decoder, {7 * layers} Linear of width {width}, {batch}×{tokens} tokens"

    def measure(kind: str, dtype: str) -> Row:
        network = decoder(layers, width, width // 64, tokens, batch, DTYPES[dtype])
        return model_step.measure(network, kind, case=case, peers=peers, rounds=arguments.rounds)

    script.run([lambda k=kind, d=dtype: measure(k, d) for dtype in dtypes for kind in arguments.kinds])


if __name__ == "__main__":
    main()
