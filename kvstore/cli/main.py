"""The command group: finds subcommands by name, so that none pays for another's imports.

Exit codes: 0 success, 1 a check found something, 2 a wrong command line, and
for every error of ``kvstore.errors`` the code that its class states there.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import ClassVar

import click

from kvstore.errors import KVStoreError

ENTRY_POINT_GROUP = "kvstore.commands"
INTERRUPTED_EXIT_CODE = 130
"""As of a process that SIGINT ended."""


class CommandGroup(click.Group):
    """The store's own commands, and those that other packages register.

    A package adds a command through the entry-point group ``kvstore.commands``;
    it is imported only when it is called (or listed by ``--help``).
    """

    OWN: ClassVar[tuple[str, ...]] = ("ls", "prune", "rm", "verify")

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        """Every command's name."""
        return sorted({*self.OWN, *(found.name for found in _registered())})

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002  # click's signature
        cmd_name: str,
    ) -> click.Command | None:
        """The command of that name, imported now."""
        command: click.Command | None = None
        if cmd_name in self.OWN:
            command = import_module(f"kvstore.cli.{cmd_name}").command
        for found in _registered(cmd_name):
            command = found.load()
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; one of our errors becomes a line on stderr and its exit code."""
        try:
            return super().invoke(ctx)
        except KVStoreError as error:
            click.echo(f"kvstore: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("kvstore: interrupted", err=True)
            ctx.exit(INTERRUPTED_EXIT_CODE)


def _registered(name: str | None = None) -> list[EntryPoint]:
    found = entry_points(group=ENTRY_POINT_GROUP)
    return list(found if name is None else found.select(name=name))


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kvstore", prog_name="kvstore")
def main() -> None:
    """Look after a store of KV caches: list, verify and prune its sessions.

    Results go to stdout, everything else to stderr. Every command has --help.
    """
    # A name that the terminal's encoding cannot show is escaped.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
