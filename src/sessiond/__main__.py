"""argv -> Settings -> run."""

from __future__ import annotations

import sys


def main() -> None:
    """The `sessiond` command."""
    from sessiond.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
