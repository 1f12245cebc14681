"""On-policy distillation of listwise JSON rankers on Ray, with reward extrapolation λ."""

__version__ = "0.1.0"
