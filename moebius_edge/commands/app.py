"""The typer application: which commands there are."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .compare import compare
from .doctor import doctor
from .download import download
from .export import export
from .inspect import inspect
from .profile import profile
from .report import report
from .run import run
from .serve import serve
from .train import train

app = typer.Typer(
    help="Inpaint photographs with the Moebius network on a Jetson, a GPU or a CPU, without PyTorch.",
    epilog="Try: moebius-edge run photo.jpg mask.png  (white in the mask is filled)",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: a third of the time to print, and it can be searched
)
for command in (run, serve, report, inspect, compare, profile, doctor, download, export, train):
    app.command()(command)

Abort = typer.Abort
# What typer raises for a wrong option. Its home has moved between versions, so it is looked up by name.
ParseError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"moebius-edge {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def parse_message(error: Exception) -> tuple[str, str]:
    """Typer's message and where the help is: error classes carry both, but their type is not public."""
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    command = getattr(getattr(error, "ctx", None), "command_path", "moebius-edge")
    return message.replace(": Value error, ", ": ").rstrip("."), f"see `{command} --help`"
