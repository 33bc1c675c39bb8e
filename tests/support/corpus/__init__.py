"""Files that nobody should have written, and everything that can be done with a file.

Every case is a name and bytes, or names and bytes of a folder; the verbs of `place` are the library's functions on a
path. Run as a program it reads the bombs among them, files that claim far more than they hold, each in a process of its
own, and prints the memory and the time that each took: `python -m tests.support.corpus FOLDER`.
"""

from .bomb_files import Measured, bombs
from .build import Entry, Files, header_of, ones, safetensors, with_header
from .checkpoints import BASE_FOLDERS, BASES, INDEX, index
from .containers import CONTAINERS
from .kohya_files import KOHYA
from .native_files import NATIVE
from .peft_folders import CONFIG, PEFT, WEIGHTS, peft
from .pickle_files import evil, pickles, saved
from .place import (
    ADAPTER_VERBS,
    BASE_VERBS,
    GOOD,
    LORA,
    PICKLE_VERBS,
    PRECIOUS,
    Pair,
    Place,
    Verb,
    model_file,
    outcome,
    pair,
)

__all__ = [
    "ADAPTER_VERBS",
    "BASES",
    "BASE_FOLDERS",
    "BASE_VERBS",
    "CONFIG",
    "CONTAINERS",
    "GOOD",
    "INDEX",
    "KOHYA",
    "LORA",
    "NATIVE",
    "PEFT",
    "PICKLE_VERBS",
    "PRECIOUS",
    "WEIGHTS",
    "Entry",
    "Files",
    "Measured",
    "Pair",
    "Place",
    "Verb",
    "bombs",
    "evil",
    "header_of",
    "index",
    "model_file",
    "ones",
    "outcome",
    "pair",
    "peft",
    "pickles",
    "safetensors",
    "saved",
    "with_header",
]
