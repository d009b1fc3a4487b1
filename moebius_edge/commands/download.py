"""``moebius-edge download``: the published weights and their autoencoder, by huggingface_hub.

Repositories and file names are those that the authors' README and several independent ports name: the four
checkpoints in ``hustvl/Moebius`` (0.9 GB each), the autoencoder in ``hustvl/PixelHacker``. They have not been
fetched by this project's tests, which run without a network, so every one of them can be overridden.
What is downloaded is not trusted: ``export`` loads it with ``weights_only=True`` and checks every tensor.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MachineError, UsageError
from . import console

if TYPE_CHECKING:
    from types import ModuleType

MODELS = {  # name -> folder in the repository
    "pretrained": "pretrained",
    "places2": "ft_places2",
    "celebahq": "ft_celebahq",
    "ffhq": "ft_ffhq",
}
REPO = "hustvl/Moebius"
VAE_REPO = "hustvl/PixelHacker"
VAE_FOLDER = "vae"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # the first that is there


def download(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(MODELS)}.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Plain files in DIR, to copy to another machine."),
    ] = None,
    repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Where the weights are.")] = REPO,
    vae_repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Where the VAE is.")] = VAE_REPO,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit of the weights; default main.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use what is there; touch no network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fetch the published weights and their autoencoder.

    What was begun is resumed, and what is there is used without asking the network.
    """
    if name not in MODELS:
        raise UsageError(
            f"unknown model {name!r}: choose one of {', '.join(MODELS)} ('tiny' comes with the package)"
        )
    hub = _import_hub()
    try:
        weights = _fetch(hub, repo, MODELS[name], revision, output, offline)
        vae = _fetch(hub, vae_repo, VAE_FOLDER, None, output, offline)
    except KeyboardInterrupt:
        raise console.Interrupted("interrupted: run the same command again to resume") from None
    config = vae.parent / "config.json"
    if not config.is_file():
        raise MachineError(f"{config} is missing: remove {vae.parent} and run the same command again")
    bundle = f"moebius-{name}"
    following = shlex.join(
        ["moebius-edge", "export", str(weights), "--vae", str(vae.parent), "--output", bundle]
    )
    if as_json:
        paths = {"checkpoint": str(weights), "vae": str(vae.parent)}
        console.print_json({**paths, "bytes": weights.stat().st_size, "next": following, "exit_code": 0})
        return
    print(f"weights  {weights} ({console.size(weights.stat().st_size)})")
    print(f"VAE      {vae.parent} ({console.size(vae.stat().st_size)})")
    print(f"next:    {following}")


def cache_folder() -> Path:
    """Where huggingface_hub keeps downloads, by its documented environment variables."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or Path(base) / "huggingface"
    return Path(home).expanduser() / "hub"


def _import_hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MachineError(
            f"the package huggingface_hub is missing or broken ({error}): run "
            '`pip install "moebius-edge[download]"`'
        ) from None
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    return huggingface_hub


def _fetch(
    hub: ModuleType, repo: str, folder: str, revision: str | None, output: Path | None, offline: bool
) -> Path:
    """The weights file of ``folder`` in ``repo``: the local one if it is whole, else downloaded."""
    wanted: dict[str, Any] = {
        "repo_id": repo,
        "revision": revision,
        "local_dir": output,
        "allow_patterns": [f"{folder}/*.json", *(f"{folder}/{name}" for name in WEIGHTS)],
    }
    if (found := _local(hub, wanted, folder)) is not None:
        return found
    where = output or cache_folder()
    if offline:
        raise MachineError(f"{repo} {folder} is not in {where}: run the same command without --offline once")
    console.note(f"downloading {repo} {folder} to {where}")
    try:
        snapshot = Path(hub.snapshot_download(**wanted))
    except Exception as error:
        problem = _problem(hub, error, repo, folder, revision, where)
        if problem is None:
            raise
        raise problem from error
    if (found := _weights(snapshot / folder)) is None:
        raise MachineError(
            f"{repo} holds no {folder}/{WEIGHTS[-1]}: name another repository with --repo or --vae-repo"
        )
    return found


def _local(hub: ModuleType, wanted: dict[str, Any], folder: str) -> Path | None:
    """What is there already. Both layouts get their final names only when a file is whole."""
    if wanted["local_dir"] is not None:
        return _weights(wanted["local_dir"] / folder)
    try:
        return _weights(Path(hub.snapshot_download(**wanted, local_files_only=True)) / folder)
    except hub.errors.LocalEntryNotFoundError:
        return None


def _weights(folder: Path) -> Path | None:
    return next((path for name in WEIGHTS if (path := folder / name).is_file()), None)


def _problem(
    hub: ModuleType, error: Exception, repo: str, folder: str, revision: str | None, where: Path
) -> MachineError | UsageError | None:
    """Our one line for what huggingface_hub and the HTTP library under it raise; None for a bug."""
    errors = hub.errors
    if isinstance(error, errors.GatedRepoError):
        return MachineError(f"{repo} asks for a login: run `hf auth login`, accept its terms, and try again")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UsageError(
            f"there is no repository {repo}, or it is private: name another, or run `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{repo} has no revision {revision!r}: name a branch, a tag or a commit")
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{repo!r} is no repository: write OWNER/NAME, such as {REPO}")
    by_hand = "run it with `--output DIR` on a machine that has a network, and copy DIR here"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return MachineError(
            f"{repo} {folder} is not in {where} and HF_HUB_OFFLINE is set: unset it, or {by_hand}"
        )
    library = type(error).__module__.split(".")[0]
    if isinstance(error, OSError) and error.filename is not None or getattr(error, "errno", None) == 28:
        return MachineError(f"cannot write to {where}: {error}: free space there or choose --output DIR")
    if isinstance(error, (ConnectionError, TimeoutError)) or library in _NETWORK_LIBRARIES:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].removeprefix("Got: ")
        return MachineError(f"cannot reach {repo} ({reason}): check the connection, or {by_hand}")
    return None


_NETWORK_LIBRARIES = {
    "huggingface_hub",
    "httpx",
    "httpx2",
    "httpcore",
    "httpcore2",
    "requests",
    "urllib3",
    "hf_xet",
}
