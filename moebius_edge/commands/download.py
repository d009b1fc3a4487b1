"""``moebius-edge download``: the published weights and what belongs to them, by huggingface_hub.

Repositories, file names and hashes are those that the authors' README and several independent ports name. The tests
run without a network, so every repository can be overridden. What is downloaded is not trusted: ``export`` runs no code
from it and checks every tensor.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..errors import BundleError, MachineError, UsageError
from . import console
from .shared import AsJson

if TYPE_CHECKING:
    from types import ModuleType

REPO = "hustvl/Moebius"
VAE_REPO = "hustvl/PixelHacker"
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
_PLACES2_SHA256 = "6525afb888e55f9b5c74fa0a5d19ca0762d720d6c716fb0f8422fbeb6868a09a"
_VAE_SHA256 = "a59d7ea697f2942d22002dc3469e8c53db807a6b78f7f5ec03bd4c1f70f98efe"
KNOWN = {
    (REPO, "ft_places2/diffusion_pytorch_model.bin"): (905_298_356, _PLACES2_SHA256),
    (VAE_REPO, "vae/diffusion_pytorch_model.bin"): (167_394_306, _VAE_SHA256),
}
_REMEDY = (
    "check the network, a proxy (HTTPS_PROXY) and the disk, log in with `hf auth login` where a repository asks, "
    "name another with --repo or --vae-repo, or run it with `--output DIR` on another machine and copy DIR here"
)


@dataclass(frozen=True)
class Folder:
    """A folder of a repository, of which the first of ``files`` that is there is the weights.

    ``output`` is where plain files go; without it they go to huggingface_hub's cache.
    """

    repo: str
    name: str
    files: tuple[str, ...]
    revision: str | None
    output: Path | None

    def weights(self, root: Path) -> Path | None:
        return next((path for name in self.files if (path := root / self.name / name).is_file()), None)


def download(
    name: Annotated[str, Argument(metavar="NAME", help=f"One of {', '.join(MODELS)}.")],
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="DIR", help="Plain files in DIR, to copy to another machine.")
    ] = None,
    repo: Annotated[str | None, Option(metavar="OWNER/NAME", help="Where the weights are; default theirs.")] = None,
    vae_repo: Annotated[str, Option(metavar="OWNER/NAME", help="Where the VAE is.")] = VAE_REPO,
    revision: Annotated[str | None, Option(metavar="REV", help="Branch, tag or commit; default main.")] = None,
    vae_revision: Annotated[str | None, Option(metavar="REV", help="The VAE's; default --revision.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch the published weights and their autoencoder.

    teacher is what a student is distilled from; elatentlpips the weights of that perceptual distance. What was begun is
    resumed, and what is there is used without asking the network. SHA-256 are printed, and compared where they are
    known.
    """
    if name not in MODELS:
        choices = f"choose one of {', '.join(MODELS)} ('tiny' comes with the package)"
        raise UsageError(f"unknown model {name!r}", choices)
    hub = _import_hub()
    source, folder, files = MODELS[name]
    folders = {"checkpoint": Folder(repo or source, folder, files, revision, output)}
    if name != DISTANCE:
        folders["vae"] = Folder(vae_repo, "vae", WEIGHTS, vae_revision or revision, output)
    with console.interruption(lambda: "interrupted: run the same command again to resume"):
        paths = {key: _fetch(hub, each) for key, each in folders.items()}
    hashes = {key: _checked_hash(path, folders[key]) for key, path in paths.items()}
    if name == DISTANCE:
        paths["checkpoint"] = _place_distance(paths["checkpoint"].parent, output or Path())
    elif not (config := paths["vae"].with_name("config.json")).is_file():
        raise MachineError(f"{config} is missing", f"remove {config.parent} and run the same command again")
    shown = {key: str(path.parent if key == "vae" else path) for key, path in paths.items()}
    next_command = _next_command(name, shown["checkpoint"], shown.get("vae"))
    if as_json:
        size = paths["checkpoint"].stat().st_size
        console.print_json({**shown, "sha256": hashes, "bytes": size, "next": next_command})
        return
    for key, path in paths.items():
        print(f"{'VAE' if key == 'vae' else 'weights':7}  {shown[key]} ({console.size(path.stat().st_size)})")
        print(f"sha256   {hashes[key]}")
    print(f"next:    {next_command}")


def _next_command(name: str, weights: str, vae: str | None) -> str:
    train = ["moebius-edge", "train", "--preset", "moebius", "--images", "PICTURES", "--output", "RUN"]
    if vae is None:
        return shlex.join([*train, "--teacher", "TEACHER", "--vae", "VAE", "--set", 'losses.distance="elatentlpips"'])
    if name == TEACHER:
        return shlex.join([*train, "--teacher", weights, "--vae", vae])
    return shlex.join(["moebius-edge", "export", weights, "--vae", vae, "--output", f"moebius-{name}"])


def _checked_hash(path: Path, folder: Folder) -> str:
    """The file's SHA-256. Of the authors' repository and its newest revision it must be the known one, if there is one.

    Raises BundleError where it is another file, damaged or published anew.
    """
    from ..system.files import sha256_file

    size, sha256 = path.stat().st_size, sha256_file(path)
    known_size, known = KNOWN.get((folder.repo, f"{folder.name}/{path.name}"), (size, sha256))
    if folder.revision is None and (size, sha256) != (known_size, known):
        raise BundleError(
            f"{path} has {size} bytes and the SHA-256 {sha256}, not the {known_size} bytes and {known} that are known",
            "remove it and run the same command again; where the authors have published anew, add --revision main",
        )
    return sha256


def _place_distance(folder: Path, root: Path) -> Path:
    """Copy E-LatentLPIPS's weights to where its package looks for them, below ``root``, and name the first of them."""
    from ..system.files import atomic_write

    target = root / _DISTANCE_FOLDER
    if lacking := [name for name in DISTANCE_FILES if not (folder / name).is_file()]:
        raise MachineError(f"{folder} lacks {', '.join(lacking)}", "remove it and run the same command again")
    console.note("E-LatentLPIPS is for non-commercial use alone (CC BY-NC 4.0, parts under NVIDIA's licence)")
    target.mkdir(parents=True, exist_ok=True)
    for name in DISTANCE_FILES:
        with atomic_write(target / name) as temporary:
            shutil.copyfile(folder / name, temporary)
    return target / DISTANCE_FILES[0]


def _import_hub() -> ModuleType:
    from ..system.machine import cache_directory, has_home

    if not has_home() and not os.environ.get("HF_HOME"):  # huggingface_hub fails, or makes a folder that is called "~"
        home = cache_directory() / "huggingface"
        os.environ["HF_HOME"] = os.fspath(home)
        console.note(f"there is no home folder: downloads are kept in {home}; HF_HOME chooses another place")
    with console.needs("download", "download"):
        import huggingface_hub
        import huggingface_hub.errors  # an attribute of the package only once it was imported
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    return huggingface_hub


def _fetch(hub: ModuleType, folder: Folder) -> Path:
    """The weights file of ``folder``: the local one if it is whole, else downloaded."""
    arguments: dict[str, Any] = {
        "repo_id": folder.repo,
        "revision": folder.revision,
        "local_dir": folder.output,
        "allow_patterns": [f"{folder.name}/{file}" for file in ("*.json", *folder.files)],
    }
    # What is there already: both layouts get their final names only when a file is whole.
    with suppress(hub.errors.LocalEntryNotFoundError):
        local = folder.output or Path(hub.snapshot_download(**arguments, local_files_only=True))
        if (weights := folder.weights(local)) is not None:
            return weights
    console.note(f"downloading {folder.repo} {folder.name}")
    try:
        snapshot = Path(hub.snapshot_download(**arguments))
    except Exception as error:  # of huggingface_hub, the HTTP library under it, the disk, a server's answer
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].removeprefix("Got: ")
        raise MachineError(f"cannot fetch {folder.repo} ({reason})", _REMEDY) from error
    if (weights := folder.weights(snapshot)) is None:
        problem = f"{folder.repo} holds no {folder.name}/{folder.files[-1]}"
        raise MachineError(problem, "name another repository with --repo or --vae-repo")
    return weights
