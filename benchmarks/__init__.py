"""Benchmarks of `lance_kernels`: one runner (`python -m benchmarks`), one registry of cases, one schema of results."""
