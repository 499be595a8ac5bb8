"""How the commands of the recipes end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mmrag.errors import MMRagError

STOPPED = 130  # exit status after Ctrl-C, as of shells


@contextmanager
def ends_cleanly() -> Iterator[None]:
    """End with one line instead of a traceback on bad input and on Ctrl-C."""
    try:
        yield
    except (MMRagError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("stopped; what was finished is kept", file=sys.stderr)
        raise SystemExit(STOPPED) from None
