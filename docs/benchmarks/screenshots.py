"""The pictures of the web page in docs/images: three widths, light and dark.

    make demo
    python docs/benchmarks/screenshots.py build/demo/library

Needs ``pip install '.[serve,dev]'`` and Chromium (``apt-get install chromium``). No language model
is asked: the answer quotes sentences.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from serve_load import start

IMAGES = Path(__file__).parents[1] / "images"
HEIGHTS = {360: 640, 800: 700, 1440: 800}  # CSS pixels of the window, by its width
COLORS = 128
# Thumbnails below the window are loaded lazily, so only those within it are waited for.
SHOWN = """() => [...document.images]
  .filter((image) => image.checkVisibility() && image.getBoundingClientRect().top < innerHeight)
  .every((image) => image.complete && image.naturalWidth)"""
QUESTION = "When may I water with the hose in summer?"
WORDS = "compost for raised beds"


def ask(page: Page) -> None:
    """An answer, and beside it the cited page where there is room for both."""
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    page.wait_for_selector(".foot .card")
    if page.viewport_size["width"] > 860:  # below, app.css lets the page cover the answer
        page.click(".answer .cite")
        page.wait_for_selector("#viewer-page:not(.loading) img[alt*='evidence marked']")


def search(page: Page) -> None:
    """Pages with their thumbnails."""
    page.click("nav a[data-view=search]")
    page.fill("#words", WORDS)
    page.press("#words", "Enter")
    page.wait_for_selector("#hits .hit")


def save(page: Page, path: Path) -> None:
    """Write what the window shows as a PNG of few colours."""
    page.evaluate("document.activeElement.blur()")  # a caret blinks
    page.wait_for_function(SHOWN)
    with Image.open(io.BytesIO(page.screenshot(animations="disabled"))) as image:
        few = image.convert("RGB").quantize(COLORS, kmeans=4, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Serve the collection and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="the collection of make demo")
    folder = parser.parse_args().folder
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    process, url, _ = start(folder)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for width, height in HEIGHTS.items():
                for scheme in ("light", "dark"):
                    size = {"width": width, "height": height}
                    page = browser.new_page(viewport=size, color_scheme=scheme)
                    page.goto(url)
                    page.wait_for_selector("#ask-about:not(:empty)")
                    for show in (ask, search):
                        show(page)
                        save(page, IMAGES / f"serve-{show.__name__}-{width}-{scheme}.png")
                        if page.is_visible("#viewer"):
                            page.click("#viewer-close")
                    page.close()
            browser.close()
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    main()
