"""Kills at any moment: see ``kill_anywhere``."""

import os

import kill_anywhere
import pytest

FULL = os.environ.get("MMRAG_HOSTILE") == "full"


@pytest.mark.slow
def test_killed_anywhere_it_ends_as_if_undisturbed(tmp_path):
    """100 kills with the variable MMRAG_HOSTILE=full, 12 without."""
    where = kill_anywhere.check(tmp_path, 100 if FULL else 12, seed=20261127)
    assert len(where) >= 3  # of the five steps, drawn by lot
