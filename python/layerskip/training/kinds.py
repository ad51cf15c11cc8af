"""The words that a recipe chooses between, apart from what computes with them: a recipe is read without torch."""

SHAPES = ("exponential", "linear", "uniform", "step")
"""How a rate of layer dropout grows with depth."""
SCALES = ("constant", "exponential")
"""How it grows with time."""
WEIGHTS = ("paper", "uniform", "linear", "sqrt", "inverse")
"""How much each exit counts."""
CURRICULA = ("all", "random", "rotational", "gradual")
"""Which exits a step trains."""
