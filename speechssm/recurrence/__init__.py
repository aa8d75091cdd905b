"""The linear recurrence and the layers around it, with their states."""

from speechssm.recurrence.scan import linear_scan

__all__ = ["linear_scan"]
