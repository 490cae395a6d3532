"""Driving noise: exact fractional Brownian motion, and its approximation by Ornstein-Uhlenbeck processes."""

from genkit.noise._covariance import fbm_covariance as fbm_covariance, fgn_autocovariance as fgn_autocovariance
from genkit.noise._diffrax import as_path as as_path
from genkit.noise._fractional_ou import (
    fou_covariance as fou_covariance,
    stationary_fou_covariance as stationary_fou_covariance,
    stationary_fou_variance as stationary_fou_variance,
)
from genkit.noise._lift import Lift as Lift, brownian as brownian, ma_fbm as ma_fbm
from genkit.noise._likelihood import fgn_log_prob as fgn_log_prob, fgn_whiten as fgn_whiten
from genkit.noise._sampling import fbm as fbm
from genkit.noise._tables import HURST_RANGE as HURST_RANGE
