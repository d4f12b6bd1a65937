"""Continual learning for the benchmarks: sequences of tasks, networks, methods and what is measured of them."""
