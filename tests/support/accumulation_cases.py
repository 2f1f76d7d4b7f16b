"""Components and types of the tests of accumulation."""

from __future__ import annotations

from support.oracle import Component

TYPES = ("H", "C", "O")

# every linear error somewhere, with masks, by type with and without weights, beside monitors that are not linear
LOSS = [
    Component("total_energy", "mse", 2.0, ignore_nan=True, per_atom=True),
    Component("total_energy", "huber_sum", 0.1, ignore_nan=True),
    Component("forces", "mse", 1.0, per_type=True, weights=(1.0, 0.5, 3.0), ignore_nan=True),
    Component("forces", "mae", 0.5, per_type=True, ignore_nan=True),
    Component("forces", "huber", 1.0, ignore_nan=True),
    Component("forces", "stratified", 0.7, ignore_nan=True),
    Component("stress", "mae", 3.0, ignore_nan=True),
    Component("stress", "rmse", None, ignore_nan=True),
    Component("stress", "huber", 0.0, ignore_nan=True),
]
WATCHED = [
    Component("forces", "rmse", None, per_type=True, ignore_nan=True),
    Component("forces", "max", None, per_type=True, ignore_nan=True),
    Component("total_energy", "max", None, ignore_nan=True, per_atom=True),
]
