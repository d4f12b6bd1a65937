"""What a sequence of tasks says about a method, from its accuracy matrix.

`R[i][j]` is the test accuracy on task `j` after training on task `i`. Backward and forward transfer are those of
Lopez-Paz and Ranzato, "Gradient Episodic Memory", NeurIPS 2017, equations 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Matrix = Sequence[Sequence[float]]


def average_accuracy(matrix: Matrix) -> float:
    """Mean accuracy on all tasks after the last."""
    return float(np.mean(matrix[-1]))


def backward_transfer(matrix: Matrix) -> float:
    """Mean change of the accuracy on a task from right after it to after the last; 0 for a single task."""
    after, final = np.diagonal(np.asarray(matrix)), np.asarray(matrix[-1])
    return float(np.mean((final - after)[:-1])) if len(after) > 1 else 0.0


def forward_transfer(matrix: Matrix, untrained: Sequence[float]) -> float:
    """Mean accuracy on a task right before it, above that of the untrained network; 0 for a single task."""
    before = [matrix[index - 1][index] - untrained[index] for index in range(1, len(matrix))]
    return float(np.mean(before)) if before else 0.0


def new_task_accuracy(matrix: Matrix) -> float:
    """Mean accuracy on each task after the first, right after training on it."""
    return float(np.mean(np.diagonal(np.asarray(matrix))[1:]))
