"""Every block of Python in README.md and docs/ runs, in order, a page in a process and a folder of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
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
#: torch and of a machine with many cores; and Python's of a fork where a library has started threads
TOLERATED = (
    "This process:DeprecationWarning",
    "`is_gradient_checkpointing` is deprecated:FutureWarning",
    "`gradient_checkpointing:FutureWarning",
    "`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning",
    "The 'train_dataloader' does not have many workers",
)


#: runs a script a line of its input as a process of its own, which has what most pages import without importing it anew
_RUNNER = """
import os, runpy, sys
import torch, diffusers, transformers, peftkit.files.load, peftkit.files.save, peftkit.wrapping.wrap

for line in sys.stdin:
    folder, name = line.rstrip("\\n").rsplit("/", 1)
    page = os.fork()
    if not page:
        os.chdir(folder)
        sys.path[0], sys.argv = folder, [name]
        for number, stream in enumerate(("out", "err"), 1):
            os.dup2(os.open(f"{name}.{stream}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        runpy.run_path(name, run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(page, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def runner() -> Iterator[subprocess.Popen[str]]:
    """Warnings are errors in it, but for those that are tolerated."""
    tolerated = [option for text in TOLERATED for option in ("-W", f"ignore:{text}")]
    command = [sys.executable, "-W", "error", *tolerated, "-c", _RUNNER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def run(runner: subprocess.Popen[str], folder: Path, name: str, code: str) -> None:
    """Run code as a program in a folder."""
    script = folder / name
    script.write_text(code)
    assert runner.stdin is not None and runner.stdout is not None
    print(script, file=runner.stdin, flush=True)
    ended = runner.stdout.readline().strip()
    assert ended == "0", Path(f"{script}.err").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, tmp_path: Path, runner: subprocess.Popen[str]) -> None:
    if page == "README.md":
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        run(runner, tmp_path, "models.py", _MODELS)
    run(runner, tmp_path, "page.py", "\n".join(PAGES[page]))


def test_pages_with_code_are_found() -> None:
    assert len(PAGES) >= 12
    assert {"README.md", "docs/writing_an_adapter.md", "docs/native_format.md"} <= set(PAGES)
    assert sum(page.startswith("docs/tutorials/") for page in PAGES) == 4
