"""`python -m peftkit` runs the `peftkit` command."""

from peftkit.cli import run

run()
