"""Expected performance: a roofline per engine step, the scheduler's steps in order, and what was measured before.

`predict` turns the shape of a model, the numbers of a machine and a workload into latencies. Everything here is plain
arithmetic on headers; nothing imports torch.
"""

from quantserve.predict.calibration import Calibration, Fastest, fastest_kernel, find_calibration
from quantserve.predict.machine import ENGINE_2023, ENGINE_NOW, Machine, machine_of
from quantserve.predict.prediction import Prediction, predict
from quantserve.predict.shape import Shape, read_shape
from quantserve.predict.workload import WORKLOADS, Workload, find_workload

__all__ = [
    "ENGINE_2023",
    "ENGINE_NOW",
    "WORKLOADS",
    "Calibration",
    "Fastest",
    "Machine",
    "Prediction",
    "Shape",
    "Workload",
    "fastest_kernel",
    "find_calibration",
    "find_workload",
    "machine_of",
    "predict",
    "read_shape",
]
