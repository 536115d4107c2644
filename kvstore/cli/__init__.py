"""The ``kvstore`` command: thin subcommands, one module each."""

from kvstore.cli.main import main

__all__ = ["main"]
