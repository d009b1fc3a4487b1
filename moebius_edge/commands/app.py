"""The typer application: which commands there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

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

# Each command with its examples: what is typed after the program's name, and what it does.
COMMANDS: dict[Callable[..., Any], dict[str, str]] = {
    run: {
        "run photo.jpg mask.png --start prefill": "remove what is white in the mask",
        "run photos masks --output filled --preset fast": "a folder; again, to go on after a kill",
    },
    serve: {
        "serve": "the bundled model, and a page to paint masks on",
        "serve --bundle places2 --port 0 --queue 4": "another, at a port that is free",
    },
    report: {
        "report tiny --images photos --output comparison": "latency and accuracy as one page",
        "report a b --images photos -o out --max-latency-ms 500": "which is best in half a second",
    },
    inspect: {
        "inspect tiny": "the bundled model",
        "inspect my-bundle --memory --json": "what its engines take of the GPU, for a program",
    },
    compare: {
        "compare places2 places2-fp16": "what FP16 changes in a picture",
        "compare places2 places2-fp16 --layers": "and in which tensors the two part",
    },
    profile: {
        "profile": "arithmetic and parameters beside the paper's",
        "profile --measure --runs 5 --threads 4": "and the time on this processor",
    },
    doctor: {
        "doctor": "what works here, and what would bring the rest",
        "doctor --json": "the same for a program",
    },
    download: {
        "download places2": "the student for photographs of places",
        "download teacher --output weights": "plain files, to copy to another machine",
    },
    export: {
        "export model.bin --vae vae --output places2": "a bundle, proven equal to PyTorch",
        "export places2 --engine tensorrt": "its engines for this machine's GPU",
    },
    train: {
        "train --preset tiny --images photos --output run": "try it on a laptop",
        "train --preset tiny --images photos --output run --resume": "go on after an interruption",
    },
}
EXIT_CODES = (
    "0 done; 2 usage; 3 the machine lacks something; 4 a bundle or engine is damaged or not for this machine; "
    "5 a measured quality is below its floor; 6 part of a folder failed; 130 Ctrl-C; 143 SIGTERM"
)


def _examples(examples: Mapping[str, str]) -> str:
    lines = [f"  {f'# {what}'}\n  moebius-edge {typed}" for typed, what in examples.items()]
    return "\n".join(("\b", "Examples:", *lines))  # \b: the help keeps these line breaks


app = typer.Typer(
    help="Inpaint photographs with the Moebius network on a Jetson, a GPU or a CPU, without PyTorch.",
    epilog=f"{_examples(COMMANDS[run])}\n\nExit codes: {EXIT_CODES}.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: a third of the time to print, and it can be searched
)
for command, examples in COMMANDS.items():
    app.command(epilog=_examples(examples))(command)

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
