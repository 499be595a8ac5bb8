"""``python -m mmrag`` is the command ``mmrag``."""

from mmrag.cli.app import main

if __name__ == "__main__":
    main()
