"""Low-rank activation compression for PyTorch: exact forward, weight gradients from small Tucker cores."""

from lance_kernels import continual, nn, ops
from lance_kernels._extension import build_info
from lance_kernels.calibrate import Calibration, calibrate
from lance_kernels.config import LanceConfig
from lance_kernels.convert import Summary, compress_, exact, revert_
from lance_kernels.drift import Drift, RecalibrateOnDrift, drift, stop_tracking, track_drift
from lance_kernels.plan import Plan, plan
from lance_kernels.report import Report, held_bytes, report
from lance_kernels.state import plain_state_dict

__all__ = [
    "Calibration",
    "Drift",
    "LanceConfig",
    "Plan",
    "RecalibrateOnDrift",
    "Report",
    "Summary",
    "build_info",
    "calibrate",
    "compress_",
    "continual",
    "drift",
    "exact",
    "held_bytes",
    "nn",
    "ops",
    "plain_state_dict",
    "plan",
    "report",
    "revert_",
    "stop_tracking",
    "track_drift",
]
