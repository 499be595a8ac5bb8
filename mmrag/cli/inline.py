"""Images in the terminal, for those that can: kitty, iTerm2 and their kin."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

from PIL import Image

_CHUNK = 4096  # bytes that kitty's protocol takes at once


def protocol(environ: Mapping[str, str]) -> str | None:
    """What a terminal understands: ``kitty``, ``iterm2``, or None for neither."""
    program, term = environ.get("TERM_PROGRAM", ""), environ.get("TERM", "")
    if "TMUX" in environ or term.startswith(("screen", "tmux")):
        return None  # a multiplexer does not pass images on
    if "KITTY_WINDOW_ID" in environ or "kitty" in term or program in ("ghostty", "WezTerm"):
        return "kitty"
    return "iterm2" if program == "iTerm.app" else None


def image_codes(image: Image.Image, how: str, columns: int) -> str:
    """The control codes that show an image over this many columns.

    Sources: https://sw.kovidgoyal.net/kitty/graphics-protocol/ and
    https://iterm2.com/documentation-images.html
    """
    stream = io.BytesIO()
    image.save(stream, "PNG")
    data = base64.standard_b64encode(stream.getvalue()).decode("ascii")
    if how == "iterm2":
        return f"\x1b]1337;File=inline=1;width={columns};preserveAspectRatio=1:{data}\x07\n"
    pieces = [data[at : at + _CHUNK] for at in range(0, len(data), _CHUNK)]
    codes = []
    for number, piece in enumerate(pieces):
        head = f"f=100,a=T,c={columns}," if number == 0 else ""
        more = int(number < len(pieces) - 1)
        codes.append(f"\x1b_G{head}m={more};{piece}\x1b\\")
    return "".join(codes) + "\n"
