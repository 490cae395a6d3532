"""Driving noise: exact fractional Brownian motion, and its approximation by Ornstein-Uhlenbeck processes."""

from ._covariance import (
    fbm_covariance as fbm_covariance,
    fgn_autocovariance as fgn_autocovariance,
)
from ._diffrax import as_path as as_path
from ._fractional_ou import (
    fou_covariance as fou_covariance,
    stationary_fou_variance as stationary_fou_variance,
)
from ._lift import Lift as Lift, brownian as brownian, ma_fbm as ma_fbm
from ._likelihood import fgn_log_prob as fgn_log_prob, fgn_whiten as fgn_whiten
from ._sampling import fbm as fbm
