"""Codecs of file formats: dicts of tensors and strings in, the same out.

May import families, delta, geometry and errors; knows no module and no live model. Public: one module a format.
"""
