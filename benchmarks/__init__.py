"""Benchmarks of `lance_kernels`: one runner (`python -m benchmarks`), one registry of cases, one schema of results."""

import os

# Read when PyTorch loads OpenMP. Threads that spin while they wait slow each other down by orders of magnitude as soon
# as another process wants a core; waiting passively costs some 20 microseconds an operator instead.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# PyTorch's profiler, which counts peaks, would print a line whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
