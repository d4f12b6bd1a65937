"""The GPU suite: `python -m benchmarks.gpu` measures ceilings and kernels, `make gpu` builds and tests before that."""
