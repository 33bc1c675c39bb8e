"""One file a model family, or a few that are built alike, each with its FAMILIES.

May import the rest of the room. A new family is a new file here: `names.FAMILIES` finds it.
"""
