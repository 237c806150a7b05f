"""`python -m cvmk`: the command line without its script."""

import sys

from cvmk.cli import main

if __name__ == "__main__":
    sys.exit(main())
