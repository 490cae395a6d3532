"""Definition files, run folders, plots: what genkit reads and writes."""

from genkit.io._definition import (
    Definition as Definition,
    DefinitionError as DefinitionError,
    Method as Method,
    load_definition as load_definition,
)
from genkit.io._draws import load_draws as load_draws, save_draws as save_draws
from genkit.io._load import load as load, load_run as load_run, save as save, with_needs as with_needs
from genkit.io._plots._bridges import plot_bridge as plot_bridge
from genkit.io._plots._draws import plot_draws as plot_draws, plot_grid as plot_grid, plot_log as plot_log
from genkit.io._plots._processes import (
    plot_covariance_error as plot_covariance_error,
    plot_hurst as plot_hurst,
    plot_paths as plot_paths,
)
