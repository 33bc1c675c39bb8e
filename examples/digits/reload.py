"""What a user does with a file: load it in a new process, merge it, restore, and merge it into another base.

    python examples/digits/reload.py FOLDER PROCESSES KIND…

demo.py runs this after training. Every claim is checked; the first that does not hold stops it.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from handwriting.base import base_model
from handwriting.diffusion import sample
from handwriting.images import DIGIT, digits, new_digit
from rich.progress import track
from safetensors.torch import load_file, save_file
from sklearn.svm import SVC
from torch import Tensor, nn

import peftkit as pk

SAMPLES, SHOWN = 100, 12  # drawn from every model, and how many of them a picture shows
JUDGED = 4000  # real digits that the judge is fitted on; it is tested on the others


class Judge:
    """A classifier of real digits, fitted on 4000 of them."""

    def __init__(self) -> None:
        images, labels = digits()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        flat = images.flatten(1)
        fitted, tested = order[:JUDGED], order[JUDGED:]
        self.classifier = SVC(C=10).fit(flat[fitted].numpy(), labels[fitted].numpy())
        self.accuracy = float(self.classifier.score(flat[tested].numpy(), labels[tested].numpy()))

    def share(self, images: Tensor) -> float:
        """The share of images that it calls the new digit."""
        return float((self.classifier.predict(images.flatten(1).numpy()) == DIGIT).mean())


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of a model as bytes, so that they can be compared exactly."""
    return {key: tensor.numpy().tobytes() for key, tensor in model.state_dict().items()}


def sampled(path: Path | None = None) -> Tensor:
    """Draw samples of a base: the demo's own, or that of a file."""
    torch.set_num_threads(1)
    return sample(base_model(path) if path else base_model(), SAMPLES)


def reload(kind: str, folder: Path) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Load, check and sample one file; what was measured, and samples of the merged model on both bases."""
    torch.set_num_threads(1)
    held_out = new_digit()[1]
    probe = held_out[:8], torch.arange(8) * 25
    model = base_model()
    before = bits(model)
    pk.load(model, folder / f"{kind}.safetensors")
    with torch.no_grad():
        wrapped = model(*probe)
        expected = load_file(folder / f"{kind}.expected")["output"]
        assert torch.equal(wrapped, expected), f"{kind}: reloaded is not what was trained"
        report = pk.merge(model, backup="packed")
        merged = model(*probe)
        images = sample(model, SAMPLES)
    error = ((merged - wrapped).norm() / wrapped.norm()).item()
    assert error < 1e-5, f"{kind}: merged differs from wrapped by {error:.1e}"
    pk.restore(model)
    pk.unwrap(model)
    assert bits(model) == before, f"{kind}: restored is not the base"

    other = base_model(folder / "other.safetensors")
    pk.load(other, folder / f"{kind}.safetensors", other_base=True)
    pk.merge(other)
    pk.unwrap(other, keep_merged=True)
    return {"merged against wrapped": error, "‖ΔW‖": report.norm}, images, sample(other, SAMPLES)


def main() -> None:
    folder, processes, kinds = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        bases = pool.submit(sampled), pool.submit(sampled, folder / "other.safetensors")
        reloaded = zip(kinds, pool.map(reload, kinds, [folder] * len(kinds)), strict=True)
        judge = Judge()
        found = dict(track(reloaded, description="reload", total=len(kinds)))
        own, other = (base.result() for base in bases)
    found = {"base": ({"judge accuracy": judge.accuracy}, own, other), **found}
    results = {
        kind: {**measured, "share": judge.share(images), "share on the other base": judge.share(others)}
        for kind, (measured, images, others) in found.items()
    }
    (folder / "reload.json").write_text(json.dumps(results))
    save_file(
        {kind: images[:SHOWN].contiguous() for kind, (_, images, _) in found.items()}, folder / "samples.safetensors"
    )


if __name__ == "__main__":
    main()
