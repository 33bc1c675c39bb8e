"""Adapters written for other programs: which program reads what, and how it is encoded, named and described.

May import formats, families and everything below files. Public: `peftkit.export`.
"""
