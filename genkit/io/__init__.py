"""Definition files, run folders, plots: what genkit reads and writes."""

from ._definition import DefinitionError as DefinitionError, load_definition as load_definition
from ._draws import load_draws as load_draws, save_draws as save_draws
from ._load import load as load, load_run as load_run, save as save, with_needs as with_needs
from ._plots import plot_draws as plot_draws, plot_grid as plot_grid, plot_log as plot_log
