"""A run: its steps, its loop, its checkpoints."""

from capdist.training.objectives import CrossEntropy, Objective
from capdist.training.self_critical import SelfCritical

OBJECTIVES: dict[str, type[Objective]] = {"cross_entropy": CrossEntropy, "scst": SelfCritical}
"""The class for each `training.objective`."""
