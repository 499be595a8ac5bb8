"""``mmrag serve`` with a stand-in embedder, as a process that can be signalled."""

import os
import sys
import time

from fakes import FakeEmbedder

import mmrag.embedders
from mmrag.cli.app import app


class Slow(FakeEmbedder):
    """Takes SLOW seconds to embed a page, so that a test can stop it in the middle."""

    def encode(self, contents, *args, **options):
        if any(content != "warm" and len(str(content)) > 200 for content in contents):
            time.sleep(float(os.environ.get("SLOW", "0")))
        return super().encode(contents, *args, **options)


if __name__ == "__main__":
    mmrag.embedders.load_embedder = lambda name, **_: Slow(str(name), dim=64)
    app(sys.argv[1:])
