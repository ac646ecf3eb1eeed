"""``python -m train``."""

import sys
from pathlib import Path

from train import main

if __name__ == "__main__":
    sys.argv[0] = str(Path(__file__).resolve().parent)  # a run's record names the command by it: train, not __main__.py
    sys.exit(main())
