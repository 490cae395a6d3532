"""`python -m genkit.cli`."""

import sys

from genkit.cli._main import main


if __name__ == "__main__":
    sys.exit(main())
