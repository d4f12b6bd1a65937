"""Bytes that the streaming kernels read from memory, counted by `ncu`, over the bytes of what they stream."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys

from benchmarks.environment import ROOT

METRIC = "dram__bytes_read.sum"
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}

# What runs under ncu: one launch to warm up, one that is counted.
PROGRAM = """
import sys
import torch
from benchmarks.gpu import shapes
from lance_kernels import ops
name = sys.argv[1]
layer = getattr(shapes, name)
tensors = shapes.tensors(layer, "cuda", torch.bfloat16, 0)
for _ in range(2):
    if sys.argv[2] == "project_kernel":
        tensors.project()
        streamed = tensors.x
    else:
        layer.weight_grad(tensors, tensors.project())
        streamed = tensors.grad
torch.cuda.synchronize()
print("streamed", streamed.nbytes)
"""
LAUNCHES = (
    ("WIDE", "project_kernel"),
    ("IMAGE_56", "project_kernel"),
    ("IMAGE_14", "project_kernel"),
    ("WIDE", "weight_grad_kernel"),
    ("CONV_28", "shifted_kernel"),
)


def report() -> int:
    """Prints a line a kernel; returns the exit status."""
    ncu = shutil.which("ncu")
    if ncu is None:
        print("ncu is not installed", file=sys.stderr)
        return 2
    status = 0
    for shape, kernel in LAUNCHES:
        command = [ncu, "--clock-control", "none", "--csv", "--metrics", METRIC, "-k", kernel, "-s", "1", "-c", "1"]
        command += [sys.executable, "-c", PROGRAM, shape, kernel]
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        try:
            read, streamed = parse(answer.stdout)
        except ValueError as error:
            print(f"{kernel}, {shape}: {error}\n{answer.stdout}{answer.stderr}", file=sys.stderr)
            status = 1
            continue
        print(f"{kernel}, {shape}: {read:.4g} bytes read, {read / streamed:.3f} of what is streamed")
    return status


def parse(output: str) -> tuple[float, float]:
    """Bytes read and bytes streamed, from what ncu and the program print.

    Raises:
        ValueError: the output has no such figures.
    """
    lines = output.splitlines()
    streamed = [float(line.split()[1]) for line in lines if line.startswith("streamed ")]
    table = [line for line in lines if line.startswith('"')]
    rows = [row for row in csv.DictReader(table) if row.get("Metric Name") == METRIC]
    if not streamed or not rows:
        raise ValueError("ncu counted nothing")
    value = float(rows[-1]["Metric Value"].replace(",", ""))
    return value * UNITS[rows[-1]["Metric Unit"]], streamed[-1]
