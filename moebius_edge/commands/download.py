"""``moebius-edge download``: the published weights and what belongs to them, by huggingface_hub.

Repositories, file names and hashes are those that the authors' README and several independent ports name: the four
students in ``hustvl/Moebius`` (0.9 GB each), their teacher and their autoencoder in ``hustvl/PixelHacker``, the
weights of E-LatentLPIPS where its package looks for them. They have not been fetched by this project's tests, which
run without a network, so every repository can be overridden. What is downloaded is not trusted: ``export`` runs no
code from it and checks every tensor.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BundleError, MachineError, UsageError
from . import console

if TYPE_CHECKING:
    from types import ModuleType

REPO = "hustvl/Moebius"
VAE_REPO = "hustvl/PixelHacker"
VAE_FOLDER = "vae"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # the first that is there
TEACHER, DISTANCE = "teacher", "elatentlpips"
# The package elatentlpips wants both, in ``ckpt`` below the folder in which a training is started.
DISTANCE_FILES, _DISTANCE_FOLDER = ("sdxl_latest_vgg16_tuned.pth", "sdxl_latent_vgg16.pth.tar"), "ckpt"
MODELS = {  # name -> repository, folder in it, files: the first that is there is the weights
    "pretrained": (REPO, "pretrained", WEIGHTS),
    "places2": (REPO, "ft_places2", WEIGHTS),
    "celebahq": (REPO, "ft_celebahq", WEIGHTS),
    "ffhq": (REPO, "ft_ffhq", WEIGHTS),
    TEACHER: (VAE_REPO, "pretrained", WEIGHTS),
    DISTANCE: ("Mingguksky/elatentlpips", "elatentlpips_ckpt", DISTANCE_FILES),
}

# Size and SHA-256 of what several people have downloaded who published both. The authors publish neither.
KNOWN = {
    (REPO, "ft_places2/diffusion_pytorch_model.bin"): (
        905_298_356,
        "6525afb888e55f9b5c74fa0a5d19ca0762d720d6c716fb0f8422fbeb6868a09a",
    ),
    (VAE_REPO, "vae/diffusion_pytorch_model.bin"): (
        167_394_306,
        "a59d7ea697f2942d22002dc3469e8c53db807a6b78f7f5ec03bd4c1f70f98efe",
    ),
}


def download(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(MODELS)}.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Plain files in DIR, to copy to another machine."),
    ] = None,
    repo: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Where the weights are; default: the authors'.")
    ] = None,
    vae_repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Where the VAE is.")] = VAE_REPO,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit, of the VAE too; default main.")
    ] = None,
    vae_revision: Annotated[
        str | None, typer.Option(metavar="REV", help="The VAE's, where it is another; default --revision.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use what is there; touch no network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fetch the published weights and their autoencoder.

    teacher is what a student is distilled from; elatentlpips the weights of that perceptual distance. What was begun is
    resumed, and what is there is used without asking the network. SHA-256 are printed, and compared where they are
    known.
    """
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}: choose one of {', '.join(MODELS)} ('tiny' comes with the package)")
    hub = _import_hub()
    source, folder, files = MODELS[name]
    source = repo or source
    vae_revision = vae_revision or revision
    try:
        weights = _fetch(hub, source, folder, files, revision, output, offline)
        vae = None if name == DISTANCE else _fetch(hub, vae_repo, VAE_FOLDER, WEIGHTS, vae_revision, output, offline)
    except KeyboardInterrupt:
        raise console.Interrupted("interrupted: run the same command again to resume") from None
    found = {"checkpoint": weights, **({} if vae is None else {"vae": vae.parent})}
    hashes = {"checkpoint": _checked_hash(weights, source, folder, revision)}
    if vae is not None:
        if not (config := vae.parent / "config.json").is_file():
            raise MachineError(f"{config} is missing: remove {vae.parent} and run the same command again")
        hashes["vae"] = _checked_hash(vae, vae_repo, VAE_FOLDER, vae_revision)
    if name == DISTANCE:
        found["checkpoint"] = weights = _place_distance(weights.parent, output or Path())
    following = _next_command(name, weights, vae)
    if as_json:
        paths = {key: str(path) for key, path in found.items()}
        console.print_json(
            {**paths, "sha256": hashes, "bytes": weights.stat().st_size, "next": following, "exit_code": 0}
        )
        return
    print(f"weights  {weights} ({console.size(weights.stat().st_size)})")
    print(f"sha256   {hashes['checkpoint']}")
    if vae is not None:
        print(f"VAE      {vae.parent} ({console.size(vae.stat().st_size)})")
        print(f"sha256   {hashes['vae']}")
    print(f"next:    {following}")


def _next_command(name: str, weights: Path, vae: Path | None) -> str:
    train = ["moebius-edge", "train", "--preset", "moebius", "--images", "PICTURES", "--output", "RUN"]
    if vae is None:
        return shlex.join([*train, "--teacher", "TEACHER", "--vae", "VAE", "--set", 'losses.distance="elatentlpips"'])
    if name == TEACHER:
        return shlex.join([*train, "--teacher", str(weights), "--vae", str(vae.parent)])
    return shlex.join(["moebius-edge", "export", str(weights), "--vae", str(vae.parent), "--output", f"moebius-{name}"])


def _checked_hash(path: Path, repo: str, folder: str, revision: str | None) -> str:
    """The file's SHA-256. Of the authors' repository and its newest revision it must be the known one, where there is
    one.

    Raises BundleError for another file: a damaged one, or a newer publication, which is to be named by its revision.
    """
    from ..system.files import sha256_file

    size, found = path.stat().st_size, sha256_file(path)
    known_size, known = KNOWN.get((repo, f"{folder}/{path.name}"), (size, found))
    if revision is None and (size, found) != (known_size, known):
        raise BundleError(
            f"{path} has {size} bytes and the SHA-256 {found}, not the {known_size} bytes and {known} that are known: "
            "remove it and run the same command again; where the authors have published anew, add --revision main"
        )
    return found


def _place_distance(folder: Path, root: Path) -> Path:
    """Copy E-LatentLPIPS's weights to where its package looks for them, below ``root``, and name the first of them."""
    from ..system.files import atomic_write

    target = root / _DISTANCE_FOLDER
    if lacking := [name for name in DISTANCE_FILES if not (folder / name).is_file()]:
        raise MachineError(f"{folder} lacks {', '.join(lacking)}: remove it and run the same command again")
    console.note("E-LatentLPIPS is for non-commercial use alone (CC BY-NC 4.0, parts under NVIDIA's licence)")
    target.mkdir(parents=True, exist_ok=True)
    for name in DISTANCE_FILES:
        with atomic_write(target / name) as temporary:
            shutil.copyfile(folder / name, temporary)
    return target / DISTANCE_FILES[0]


def cache_folder() -> Path:
    """Where huggingface_hub keeps downloads, by its documented environment variables."""
    from ..system.machine import cache_directory

    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(os.path.expanduser(cache))
    home = os.environ.get("HF_HOME") or cache_directory() / "huggingface"
    return Path(os.path.expanduser(home)) / "hub"


def _import_hub() -> ModuleType:
    from ..system.machine import cache_directory, has_home

    if not has_home() and not os.environ.get("HF_HOME"):  # huggingface_hub would make a folder that is called "~"
        home = cache_directory() / "huggingface"
        os.environ["HF_HOME"] = os.fspath(home)
        console.note(f"there is no home folder: downloads are kept in {home}; HF_HOME chooses another place")
    try:
        import huggingface_hub
    except ImportError as error:
        raise MachineError(
            f'the package huggingface_hub is missing or broken ({error}): run `pip install "moebius-edge[download]"`'
        ) from None
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    return huggingface_hub


def _fetch(
    hub: ModuleType,
    repo: str,
    folder: str,
    files: tuple[str, ...],
    revision: str | None,
    output: Path | None,
    offline: bool,
) -> Path:
    """The first of ``files`` that is there: the weights file of ``folder`` in ``repo``: the local one if it is whole,
    else downloaded."""
    wanted: dict[str, Any] = {
        "repo_id": repo,
        "revision": revision,
        "local_dir": output,
        "allow_patterns": [f"{folder}/*.json", *(f"{folder}/{name}" for name in files)],
    }
    if (found := _local(hub, wanted, folder, files)) is not None:
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
    if (found := _weights(snapshot / folder, files)) is None:
        raise MachineError(f"{repo} holds no {folder}/{files[-1]}: name another repository with --repo or --vae-repo")
    return found


def _local(hub: ModuleType, wanted: dict[str, Any], folder: str, files: tuple[str, ...]) -> Path | None:
    """What is there already. Both layouts get their final names only when a file is whole."""
    if wanted["local_dir"] is not None:
        return _weights(wanted["local_dir"] / folder, files)
    try:
        return _weights(Path(hub.snapshot_download(**wanted, local_files_only=True)) / folder, files)
    except hub.errors.LocalEntryNotFoundError:
        return None


def _weights(folder: Path, files: tuple[str, ...]) -> Path | None:
    return next((path for name in files if (path := folder / name).is_file()), None)


def _problem(
    hub: ModuleType, error: Exception, repo: str, folder: str, revision: str | None, where: Path
) -> MachineError | UsageError | None:
    """Our one line for what huggingface_hub and the HTTP library under it raise; None for a bug."""
    errors, causes = hub.errors, _causes(error)

    def is_a(kind: type[Exception]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if is_a(errors.GatedRepoError):
        return MachineError(f"{repo} asks for a login: run `hf auth login`, accept its terms, and try again")
    if is_a(errors.RepositoryNotFoundError):
        return UsageError(f"there is no repository {repo}, or it is private: name another, or run `hf auth login`")
    if is_a(errors.RevisionNotFoundError):
        return UsageError(
            f"{repo} has no revision {revision!r}: name a branch, a tag or a commit, the VAE's with --vae-revision"
        )
    if is_a(errors.HFValidationError):
        return UsageError(f"{repo!r} is no repository: write OWNER/NAME, such as {REPO}")
    by_hand = "run it with `--output DIR` on a machine that has a network, and copy DIR here"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return MachineError(f"{repo} {folder} is not in {where} and HF_HUB_OFFLINE is set: unset it, or {by_hand}")
    if isinstance(error, OSError) and error.filename is not None or getattr(error, "errno", None) == 28:
        return MachineError(f"cannot write to {where}: {error}: free space there or choose --output DIR")
    from huggingface_hub.constants import ENDPOINT as server

    statuses = [getattr(getattr(cause, "response", None), "status_code", None) for cause in causes]
    if status := next((status for status in statuses if isinstance(status, int) and status >= 400), None):
        remedy = _status_remedy(status, repo, server)
        return MachineError(f"{server} does not give {repo}, it answered {status}: {remedy}")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].removeprefix("Got: ")
    if any(type(cause).__name__ == "ProxyError" for cause in causes):
        return MachineError(f"cannot reach {repo} through the proxy ({reason}): check HTTPS_PROXY, or {by_hand}")
    if any("CERTIFICATE_VERIFY_FAILED" in str(cause) for cause in causes):
        return MachineError(
            f"the certificate of {server} is not trusted here ({reason}): set SSL_CERT_FILE to your organisation's "
            f"certificates, or {by_hand}"
        )
    library = type(error).__module__.split(".")[0]
    if isinstance(error, (ConnectionError, TimeoutError)) or library in _NETWORK_LIBRARIES:
        return MachineError(f"cannot reach {repo} ({reason}): check the connection, or {by_hand}")
    if isinstance(error, OSError):  # a file that is not as long as the server has said
        return MachineError(f"the download of {repo} went wrong ({reason}): run the same command again")
    *_, place = traceback.extract_tb(error.__traceback__)
    reading = isinstance(error, TypeError) and place.filename.endswith("hf_api.py")
    if isinstance(error, (ValueError, KeyError, AttributeError)) or reading:
        return MachineError(
            f"{server} answered with something else than a list of files: open it in a browser, this network may ask "
            f"for a login; or check HF_ENDPOINT, or {by_hand}"
        )
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """The error and all that it was raised from: huggingface_hub wraps what a server answered."""
    causes: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in causes:
        causes.append(current)
        current = current.__cause__ or current.__context__
    return causes


def _status_remedy(status: int, repo: str, server: str) -> str:
    """What to do about an HTTP status that huggingface_hub has no error of its own for."""
    remedies = {
        401: "run `hf auth login`, or unset HF_TOKEN if an old token stands in it",
        403: f"accept the licence on {server}/{repo}, run `hf auth login`, and check that the token may read it",
        404: "name another repository with --repo or --vae-repo, or check HF_ENDPOINT",
        407: "the proxy asks for a login: set HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT",
        429: "these were too many requests: wait some minutes and run the same command again; a login raises the limit",
    }
    if status >= 500:
        return "the server has a fault: run the same command again later"
    return remedies.get(status, f"open {server}/{repo} in a browser to see why")


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
