"""The command line: `genkit demo | train | sample | infer | info | zoo`."""

from ._main import main as main
