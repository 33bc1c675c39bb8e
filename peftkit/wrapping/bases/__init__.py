"""Weights that a layer keeps quantised: how their numbers are read, how their layer is run and how they are merged."""
