"""Runs the command as `python -m hf_stepflow.cli`, for launchers that start modules."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
