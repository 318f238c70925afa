"""Entry point of ``attrim``: says what to install when the command line's own packages are missing."""

from __future__ import annotations

import sys

from attrim.errors import MissingDependencyError

__all__ = ["main"]

_PACKAGES = ("typer", "rich", "yaml", "pydantic")


def main() -> None:
    """Run the command line and exit with its status: 0, 1 for a failure, 2 for wrong usage."""
    try:
        from attrim.cli.app import run
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        sys.stderr.write(f"attrim: {MissingDependencyError(package, 'cli', 'the command line')}\n")
        raise SystemExit(1) from None
    raise SystemExit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
