"""Lets the tests run on the source tree, installed or not, and without telemetry."""

import os
import sys
from pathlib import Path

# Haystack reads it when it is imported, and sends what pipelines are made of.
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
sys.path.insert(0, str(Path(__file__).parent))
