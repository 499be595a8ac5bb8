"""Lets the tests run on the source tree, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
