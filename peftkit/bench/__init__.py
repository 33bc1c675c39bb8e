"""What adapter operations cost: against a floor, against the frozen layer, and against other libraries, in one run."""
