"""Train the base of the demo: a U-Net that has only ever seen the digits 0 to 7.

    python examples/digits/train_base.py            # about ten minutes on one core

Writes base.safetensors beside this file (fp16, 1.2 MB).
"""

from __future__ import annotations

import torch
from handwriting.base import FILE, train
from handwriting.diffusion import evaluate
from handwriting.images import digits, known_digits
from handwriting.unet import UNet
from safetensors.torch import save_file

STEPS = 5000


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seen, held_out = known_digits()
    model = train(UNet(), seen, steps=STEPS, lr=2e-3, batch=64)
    images, labels = digits()
    known, unseen = evaluate(model, held_out), evaluate(model, images[labels >= 8])
    print(f"held-out loss on 0-7: {known:.4f}   on the unseen 8 and 9: {unseen:.4f}")
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, FILE)
    print(f"wrote {FILE.name}, {FILE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
