"""Definition files, run folders, plots: what genkit reads and writes."""

from ._bridge_plots import plot_bridge as plot_bridge
from ._definition import DefinitionError as DefinitionError, load_definition as load_definition
from ._draws import load_draws as load_draws, save_draws as save_draws
from ._load import load as load, load_run as load_run, save as save, with_needs as with_needs
from ._plots import plot_draws as plot_draws, plot_grid as plot_grid, plot_log as plot_log
from ._sde_plots import (
    plot_covariance_error as plot_covariance_error,
    plot_hurst as plot_hurst,
    plot_paths as plot_paths,
)
