"""The version of peftkit."""

__version__ = "0.1.0"
