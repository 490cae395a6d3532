"""Guidance: objects that steer a denoiser, combine, carry state, and say which evaluations they need."""

from ._cfg import CFG as CFG, cfg as cfg
from ._interval import Interval as Interval, interval as interval
