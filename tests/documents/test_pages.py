"""Every block of Python in README.md and docs/ runs, page by page, in order, in one process and an empty folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {
    str(path.relative_to(ROOT)): blocks
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if (blocks := BLOCK.findall(path.read_text()))
}

#: what README.md loads by name: a pipeline with the layout of SD 1.5 and a Llama, tiny and untrained
_MODELS = """
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaForCausalLM

text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
ends = dict(bos_token_id=52, eos_token_id=53, pad_token_id=53)
StableDiffusionPipeline(
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=16),
    CLIPTextModel(CLIPTextConfig(vocab_size=54, max_position_embeddings=16, **text, **ends)),
    CLIPTokenizer("vocab.json", "merges.txt", model_max_length=16),
    UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,) * 4, cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4
    ),
    DDIMScheduler(steps_offset=1, clip_sample=False), None, None, requires_safety_checker=False,
).save_pretrained("sd15")
LlamaForCausalLM(LlamaConfig(vocab_size=32, **text)).save_pretrained("llama")
"""


#: warnings that other libraries give of themselves, by their beginnings: PEFT and TRL of transformers, Lightning of
#: torch and of a machine with many cores
TOLERATED = (
    "`is_gradient_checkpointing` is deprecated:FutureWarning",
    "`gradient_checkpointing:FutureWarning",
    "`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning",
    "The 'train_dataloader' does not have many workers",
)


def run(folder: Path, name: str, code: str) -> None:
    """Run code as a program in a folder; warnings are errors, but for those that are tolerated."""
    script = folder / name
    script.write_text(code)
    tolerated = [option for text in TOLERATED for option in ("-W", f"ignore:{text}")]
    command = [sys.executable, "-W", "error", *tolerated, name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, tmp_path: Path) -> None:
    if page == "README.md":
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        run(tmp_path, "models.py", _MODELS)
    run(tmp_path, "page.py", "\n".join(PAGES[page]))


def test_pages_with_code_are_found() -> None:
    assert len(PAGES) >= 12
    assert {"README.md", "docs/writing_an_adapter.md", "docs/native_format.md"} <= set(PAGES)
    assert sum(page.startswith("docs/tutorials/") for page in PAGES) == 4
