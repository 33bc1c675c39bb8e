"""Model architectures by name: which layers a family has, and what each program calls them.

May import geometry and errors. Public: `names.FAMILIES`, and one module a group of architectures.
"""
