"""`python -m lowrank_optax`, the same as `lowrank-optax`."""

import sys


def main() -> None:
    """Runs the command line; says what to install where something is missing."""
    try:
        from lowrank_optax._command_line import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"error: the command line needs {error.name}: in a checkout pip install '.[cli]'")
    app()


if __name__ == "__main__":
    main()
