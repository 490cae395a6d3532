"""The command line: `genkit demo | train | sample | infer | info | zoo`."""

from genkit.cli._main import main as main
