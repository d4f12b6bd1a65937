"""Measures suites of cases; every result is a row of JSON from which the tables and plots are made."""

from benchmarks.suites import cpu

__all__ = ["cpu"]
