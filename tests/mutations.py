"""Files damaged by seed, each opened in a process of its own that has a limit of time and of memory. Not a test.

    python tests/mutations.py picture|checkpoint|bundle FIRST COUNT FOLDER

prints one line of JSON for each seed: what was changed, how it ended (an exit code, "traceback", "time" or a signal),
the seconds, the peak of the memory, and what was printed. The same seed makes the same file.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import pickletools
import random
import resource
import select
import shutil
import signal
import struct
import sys
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 60  # of a case; a machine that does other things as well is slow
BYTES = 2 << 30  # of address space above this process's own
NUMBERS = (-1, 0, 1, 3, 7, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1)


def share(count: int) -> int:
    """``count``, or the part of it that the environment asks for (MUTATION_SHARE, 1 for all), at least 10."""
    return max(10, round(count * float(os.environ.get("MUTATION_SHARE", "1"))))


def change_bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Some bytes turned, copied, removed, doubled or replaced by a large number."""
    changed = bytearray(data)
    kind = rng.choice(("flip", "copy", "cut", "double", "number"))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, length = rng.randrange(len(changed)), rng.choice((1, 4, 16, 64, 256))
        if kind == "flip":
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "copy":
            source = rng.randrange(len(changed))
            changed[at : at + length] = changed[source : source + length]
        elif kind == "cut":
            return kind, bytes(changed[: at + 1])
        elif kind == "double":
            changed[at:at] = changed[at : at + length]
        else:
            changed[at : at + 1] = rng.choice((b"\xff\xff\xff\xff\x0f", b"\xff" * 8, (1 << 40).to_bytes(8, "little")))
    return kind, bytes(changed)


def change_start(data: bytes, rng: random.Random, lengths: tuple[int, ...]) -> tuple[str, bytes]:
    """As ``change_bytes``, often among the first bytes alone, which decide more than what is behind them."""
    head = rng.choice((*lengths, len(data)))
    what, changed = change_bytes(data[:head], rng)
    return what, changed if what == "cut" else changed + data[head:]


def exit_code(call: Callable[..., object], *arguments: object) -> int:
    """How the command line would end: 0, or the code of the error, which is printed."""
    from moebius_edge.errors import MoebiusError

    try:
        call(*arguments)
    except MoebiusError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


# --- pictures --------------------------------------------------------------------------------------------

_SIZE = (72, 60)  # of all the pictures, so that where a file gives its size can be found


def corpus() -> dict[str, bytes]:
    """Valid small pictures, all of one size, in all the modes and formats that are read, by name."""
    import numpy as np
    from PIL import Image, ImageCms, PngImagePlugin

    y, x = np.mgrid[: _SIZE[1], : _SIZE[0]]
    smooth = np.stack([3 * x, 4 * y, (x * y) % 256], 2)
    rgb = np.clip(smooth + np.random.default_rng(0).integers(0, 20, smooth.shape), 0, 255).astype(np.uint8)
    colour, clear = Image.fromarray(rgb), Image.fromarray(np.dstack([rgb, 255 - rgb[..., 0]]))
    frames = [colour.quantize(64), colour.rotate(90).resize(_SIZE).quantize(64)]
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    described = {"exif": exif.tobytes(), "icc_profile": profile, "dpi": (300, 300)}
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "a comment " * 50, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>")
    grey = Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
    several = {"save_all": True, "append_images": frames[1:]}
    pictures = {
        "rgb.png": (colour, described | {"pnginfo": text}),
        "rgba.png": (clear, {}),
        "palette.png": (frames[0], {"transparency": 3}),
        "grey16.png": (grey, {}),
        "baseline.jpg": (colour, described),
        "progressive.jpg": (colour, {"progressive": True}),
        "cmyk.jpg": (colour.convert("CMYK"), {}),
        "raw.tif": (colour, described),
        "lzw.tif": (clear, {"compression": "tiff_lzw"}),
        "deflate16.tif": (grey, {"compression": "tiff_adobe_deflate"}),
        "fax.tif": (colour.convert("1"), {"compression": "group4"}),
        "jpeg.tif": (colour, {"compression": "jpeg"}),
        "pages.tif": (frames[0], several),
        "lossy.webp": (clear, described),
        "lossless.webp": (colour, {"lossless": True}),
        "animated.gif": (frames[0], several),
        "rgb.bmp": (colour, {}),
        "rgb.avif": (colour, {"speed": 10}),
        "rgb.jp2": (colour, {}),
    }
    Image.init()
    contents = {}
    for name, (image, options) in pictures.items():
        stream = io.BytesIO()
        image.save(stream, Image.EXTENSION[Path(name).suffix], **options)
        contents[name] = stream.getvalue()
    return contents


def make_picture(folder: Path, seed: int) -> tuple[str, Path]:
    rng = random.Random(seed)
    original = rng.choice(sorted(folder.glob("*.valid")))
    data = original.read_bytes()
    code = rng.choice((">H", "<H", ">I", "<I"))
    if rng.random() < 0.25 and (at := data.find(struct.pack(code, rng.choice(_SIZE)), rng.randrange(32))) >= 0:
        number = rng.choice((*NUMBERS, rng.randrange(20_000))) % (1 << 8 * struct.calcsize(code))
        what, data = "size", data[:at] + struct.pack(code, number) + data[at + struct.calcsize(code) :]
    else:
        what, data = change_start(data, rng, (64, 600))
    path = folder / f"{seed}-{original.stem}"
    path.write_bytes(with_checksums(data) if rng.random() < 0.7 else data)
    return f"{original.stem}: {what}", path


def with_checksums(data: bytes) -> bytes:
    """A damaged PNG with right checksums, or damage would never get further than to them; others as they are."""
    fixed, at = bytearray(data), 8 if data.startswith(b"\x89PNG\r\n\x1a\n") else len(data)
    while at + 12 <= len(data) and (end := at + 8 + int.from_bytes(data[at : at + 4], "big")) + 4 <= len(data):
        struct.pack_into(">I", fixed, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


def prepare_pictures(folder: Path) -> Any:
    """The files that are changed; how one is opened: as picture and as mask, then written in every format."""
    import numpy as np

    from moebius_edge.errors import MoebiusError
    from moebius_edge.imaging.mask_files import read_mask
    from moebius_edge.imaging.pictures import OUTPUT_FORMATS, read_picture, write_picture

    for name, data in corpus().items():
        (folder / f"{name}.valid").write_bytes(data)

    def use(path: Path) -> None:
        picture = read_picture(path)
        with suppress(MoebiusError):
            read_mask(path, picture)
        for suffix, form in OUTPUT_FORMATS.items() if picture.pixels.size < 1 << 18 else ():
            with suppress(MoebiusError):
                write_picture(folder / f"out{suffix}", picture)
                again = read_picture(folder / f"out{suffix}")
                assert form not in ("PNG", "TIFF") or np.array_equal(again.samples, picture.samples)

    return make_picture, lambda path: exit_code(use, path)


# --- checkpoints -----------------------------------------------------------------------------------------


def make_checkpoint(folder: Path, seed: int) -> tuple[str, Path]:
    rng = random.Random(seed)
    path = folder / f"{seed}{rng.choice(('.bin', '.pt', '.ckpt', '.safetensors'))}"
    kind = rng.choice(("zip", "old", "safetensors", "archive"))
    original = (folder / f"{'zip' if kind == 'archive' else kind}.weights").read_bytes()
    if kind == "archive":
        what, data = change_archive(original, rng)
    else:
        what, data = change_start(original, rng, (200, 4000, 100_000))
    path.write_bytes(data)
    return f"{kind}: {what}", path


def change_archive(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A zip archive whose members are right again after a change in its pickle, in their number or packing."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in members if name.endswith("data.pkl"))
    what = rng.choice(("bytes", "operation", "operation", "deflated", "lacking"))
    if what == "bytes":
        _, members[name] = change_bytes(members[name], rng)
    elif what == "operation":
        members[name] = change_operation(members[name], rng)
    elif what == "lacking":
        del members[rng.choice(list(members))]
    else:
        members[name] += bytes(100_000_000)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if what == "deflated" else zipfile.ZIP_STORED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return what, stream.getvalue()


def change_operation(data: bytes, rng: random.Random) -> bytes:
    """A pickle with some of its instructions replaced, by others of its own or by numbers."""
    places = [place for _, _, place in pickletools.genops(data)]
    parts = [data[a:b] for a, b in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 1, 3, 20))):
        number = pickle.dumps(rng.choice(NUMBERS), 2)[2:-1]
        parts[rng.randrange(1, len(parts))] = rng.choice((rng.choice(parts), number, b"}", b"]", b"R", b"2", b"N"))
    return b"".join(parts)


def prepare_checkpoints(folder: Path) -> Any:
    """The files that are changed; how one is opened."""
    import torch
    from golden import golden_state
    from safetensors.torch import save_file

    from moebius_edge.model import StudentConfig, build_student, load_checkpoint

    torch.set_num_threads(1)
    student = build_student(StudentConfig((32, 32), 2, 16, 16, latent_size=8, window=3, layers_per_block=1))
    state = golden_state(student)
    torch.save(state, folder / "zip.weights")
    torch.save({"state_dict": state}, folder / "old.weights", _use_new_zipfile_serialization=False)
    save_file(state, folder / "safetensors.weights")

    return make_checkpoint, lambda path: exit_code(load_checkpoint, student, path)


# --- bundles ---------------------------------------------------------------------------------------------


VALUES: tuple[Any, ...] = (
    *(None, True, 0.5, 1e308, float("nan"), float("inf"), 10**30, *NUMBERS),
    *("", "64", "x" * 5000, "two\nlines", "\x1b[2J", "\0", "\ud800", "/etc/passwd", "../bundle.json"),
    *([], {}, [None], [[]], ["a", 1], {"a": {"b": []}}, {"": None}, [1.5] * 20),
)


def make_bundle(folder: Path, seed: int) -> tuple[str, Path]:
    from toy import describe_again

    rng = random.Random(seed)
    made = folder / str(seed)
    shutil.copytree(folder / rng.choice(("tiny", "toy")), made)
    if rng.random() < 0.3:
        path = made / "bundle.json"
        kind, data = (change_bytes if rng.random() < 0.3 else change_document)(path.read_bytes(), rng)
        path.write_bytes(data)
        return f"bundle.json: {kind}", made
    path = rng.choice(sorted(made.glob("*.onnx")))
    kind, data = (change_bytes if rng.random() < 0.4 else change_graph)(path.read_bytes(), rng)
    path.write_bytes(data)
    return f"{path.stem}: {kind}", describe_again(made)


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every container and key of a document: where something can be changed."""
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    return [place for key in keys for place in ((document, key), *places(document[key]))]


def change_document(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """JSON with a field or two replaced, removed, renamed or given the value of another."""
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.choice(("value", "value", "remove", "rename", "other"))
        field = rng.choice(list(document))
        named = [place for place in places(document[field]) if isinstance(place[0], dict)]
        container, key = rng.choice([(document, field), *named])
        if kind == "remove":
            del container[key]
        elif kind == "rename":
            container[rng.choice(("", "x" * 999, "two\nlines", "/etc/passwd", "a/../b"))] = container.pop(key)
        else:
            other, name = rng.choice(places(document))
            container[key] = copy.deepcopy(other[name]) if kind == "other" else rng.choice(VALUES)
    return kind, json.dumps(document).encode()


def change_graph(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A graph with attributes, sizes, edges, operators or functions replaced, well formed as a message."""
    import onnx

    model = onnx.ModelProto.FromString(data)
    nodes = list(model.graph.node)
    operators = ("Tile", "Expand", "ConstantOfShape", "Range", "Loop", "NonZero", "Conv", "Resize", "Pad", "If")
    kind = rng.choice(("attribute", "dims", "edge", "operator", "function", "shape", "many"))
    for _ in range(rng.choice((1, 1, 3))):
        if kind == "attribute" and (attributes := [a for n in nodes for a in n.attribute if a.i or a.ints]):
            attribute = rng.choice(attributes)
            if attribute.ints:
                attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(NUMBERS)
            else:
                attribute.i = rng.choice(NUMBERS)
        elif kind == "dims" and (tensor := rng.choice(model.graph.initializer)).dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)
        elif kind == "edge":
            node = rng.choice([n for n in nodes if n.input])
            names = [name for n in nodes for name in n.output] + [t.name for t in model.graph.initializer]
            node.input[rng.randrange(len(node.input))] = rng.choice(names)
        elif kind == "operator":
            rng.choice(nodes).op_type = rng.choice(operators)
        elif kind == "function" and model.functions:
            node = rng.choice(rng.choice(model.functions).node)
            node.op_type, node.domain = rng.choice(("LocalLambda", "InteractiveLambda")), "moebius"
        elif kind == "shape":
            value = rng.choice([*model.graph.value_info, *model.graph.input, *model.graph.output])
            if dims := value.type.tensor_type.shape.dim:
                dims[rng.randrange(len(dims))].dim_value = rng.choice(NUMBERS)
        elif kind == "many":
            model.graph.node.extend([rng.choice(nodes)] * rng.choice((100, 30_000)))
    return kind, model.SerializeToString()


def prepare_bundles(folder: Path) -> Any:
    import onnxruntime  # noqa: F401 - once, and not in every process
    from toy import make_toy_bundle

    from moebius_edge.bundle.bundle import ASSETS
    from moebius_edge.cli import main

    make_toy_bundle(folder / "toy", deep=True)
    shutil.copytree(ASSETS / "tiny", folder / "tiny", ignore=shutil.ignore_patterns("checkpoint"))
    examples = Path(__file__).parents[1] / "examples"

    def opens(bundle: Path) -> int:
        image, mask, output = examples / "coffee.png", examples / "coffee_mask.png", f"{bundle}.png"
        settings = ["--steps", "4", "--cache-interval", "2", "--runtime", "onnxruntime", "--device", "cpu"]
        os.environ["MOEBIUS_EDGE_OWNS_PROCESS"] = "1"  # as of the command itself
        return main(["run", str(image), str(mask), "--bundle", str(bundle), "--output", output, *settings])

    return make_bundle, opens


# --- the processes ---------------------------------------------------------------------------------------


def run_case(opens: Any, path: Path) -> dict[str, Any]:
    """``opens(path)`` in a fork of this process."""
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        for stream in (1, 2):
            os.dup2(writing, stream)
        sys.stdout = sys.stderr = os.fdopen(writing, "w", buffering=1)  # theirs would go on as files of the old kind
        own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (own + BYTES, own + BYTES))
        code = 99
        try:
            code = opens(path)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(writing)
    said, ended = b"", False
    while (left := start + SECONDS - time.monotonic()) > 0 and not ended:
        if select.select([reading], [], [], left)[0]:
            said += (part := os.read(reading, 65536))
            ended = not part
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status, usage = os.wait4(child, 0)
    text = said.decode(errors="replace")
    outcome: Any = os.waitstatus_to_exitcode(status)
    return {
        "outcome": "time" if not ended else "traceback" if "Traceback" in text else outcome,
        "seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": usage.ru_maxrss // 1024,
        "said": text.strip().splitlines()[-50:],
    }


PREPARE = {"picture": prepare_pictures, "checkpoint": prepare_checkpoints, "bundle": prepare_bundles}


def work(kind: str, first: int, count: int, folder: Path) -> None:
    make, opens = PREPARE[kind](folder)
    for seed in range(first, first + count):
        what, path = make(folder, seed)
        print(json.dumps({"seed": seed, "what": what, **run_case(opens, path)}), flush=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
