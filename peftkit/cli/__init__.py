"""The `peftkit` command: a thin layer over the public functions.

May import everything; nothing imports it. Public: `app` (typer) and `run` (the entry point).
"""

from peftkit.cli.main import app as app
from peftkit.cli.process import run as run
