"""Continual learning: tasks in orthogonal subspaces, with compressed activations from the first task on."""

from lance_kernels.continual.learner import NullSpaceLearner
from lance_kernels.continual.summary import Capacity, LayerMemory, LearnerSummary, Memory

__all__ = ["Capacity", "LayerMemory", "LearnerSummary", "Memory", "NullSpaceLearner"]
