"""The command line as a whole: help in a blink, exit codes, one-line errors, JSON for errors too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

import moebius_edge
from moebius_edge import errors, options
from moebius_edge.calibration.quantise import TARGETS
from moebius_edge.calibration.ranges import METHODS
from moebius_edge.cli import main
from moebius_edge.commands import app as app_module
from moebius_edge.commands import console
from moebius_edge.pipeline.presets import PRESETS
from moebius_edge.runtimes.auto import CANDIDATES
from moebius_edge.runtimes.flavours import FLAVOURS
from moebius_edge.sampling.scheduler import SCHEDULERS

COMMANDS = ("run", "inspect", "compare", "profile", "doctor", "download", "export", "train")
HEAVY = ("numpy", "cv2", "PIL", "torch", "onnxruntime", "onnx", "huggingface_hub", "rich.markdown")


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_help_imports_nothing_heavy() -> None:
    calls = [["--help"], [], ["--version"], *([command, "--help"] for command in COMMANDS)]
    done = fresh(
        "import sys\nfrom moebius_edge.cli import main\n"
        f"codes = [main(call) for call in {calls}]\n"
        f"print(codes, [m for m in {HEAVY} if m in sys.modules])"
    )
    assert (done.stdout.splitlines()[-1], done.stderr) == (f"{[0] * len(calls)} []", "")


def test_help_answers_in_a_blink() -> None:
    """Within 0.3 s. Of CPU time, for a machine busy with other things makes any wall-clock figure wrong."""
    resource = pytest.importorskip("resource", reason="needs getrusage for a child's CPU time")

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "moebius_edge", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.3


def test_the_device_path_never_imports_torch() -> None:
    modules = ("cli", "pipeline.inpainter", "bundle.bundle", "imaging.pictures", "runtimes.ort", "commands.run")
    code = "import sys\n" + "".join(f"import moebius_edge.{m}\n" for m in modules)
    done = fresh(code + "print([m for m in ('torch', 'onnx', 'diffusers') if m in sys.modules])")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_help_names_every_command_on_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert set(COMMANDS) <= set(listed)
    assert [line for name, line in listed.items() if name in COMMANDS and line.endswith("...")] == []


def test_python_m_and_the_version() -> None:
    done = subprocess.run([sys.executable, "-m", "moebius_edge", "--version"], capture_output=True, text=True)
    assert done.stdout == f"moebius-edge {moebius_edge.__version__}\n"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument 'IMAGE': see `moebius-edge run --help`"),
        (["runn"], "No such command 'runn'"),
        (["run", "a", "b", "--steps", "many"], "Invalid value for '--steps': "),
        (["run", "a", "b", "--steps", "0"], "Invalid value for '--steps': "),
        (["run", "a", "b", "--guidance", "-1"], "Invalid value for '--guidance': "),
        (["run", "a", "b", "--guidance", "nan"], "Invalid value for '--guidance': "),
        *(
            (["run", "a", "b", "--guidance-interval", x], f"guidance-interval': '{x}' is not two whole numbers such as")
            for x in ("200", "a,b", "1,2,3", "0.2,0.8", "")
        ),
        (["run", "a", "b", "--preset", "slow"], "Invalid value for '--preset': 'slow' is not one of 'fast'"),
        (
            ["run", "a", "b", "--start", "x"],
            "Invalid value for '--start': 'x' is not one of 'image', 'prefill'",
        ),
        (["run", "a", "b", "--scheduler", "x"], "Invalid value for '--scheduler': 'x' is not one of 'ddim'"),
        (["run", "a", "b", "--colour"], "No such option: --colour"),
        (["inspect"], "Missing argument 'BUNDLE'"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1


def test_the_choices_are_those_of_the_modules_that_implement_them() -> None:
    assert tuple(SCHEDULERS) == options.SCHEDULERS
    assert tuple(PRESETS) == options.PRESETS
    assert tuple(FLAVOURS) == options.ENGINES
    assert set(options.DEVICES) == {candidate.device for candidate in CANDIDATES}
    assert tuple(METHODS) == options.RANGES
    assert tuple(TARGETS) == options.INT8_TARGETS


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.UsageError, 2),
        (errors.MachineError, 3),
        (errors.BundleError, 4),
        (errors.QualityError, 5),
        (errors.PartialFailure, 6),
        (console.Interrupted, 130),
    ],
)
def test_every_error_has_its_exit_code(
    kind: type[errors.MoebiusError],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(**options: object) -> None:
        raise kind("what is wrong [bold]/tmp/[a]  b.png[/bold]:\n   what mends it")

    with_command(monkeypatch, fails)
    assert main(["fails"]) == code
    prefix = "" if code == 130 else "error: "
    expected = f"{prefix}what is wrong [bold]/tmp/[a]  b.png[/bold]: what mends it\n"
    assert capsys.readouterr() == ("", expected)


def with_command(monkeypatch: pytest.MonkeyPatch, function: object) -> None:
    """Let the program have one command, ``fails``."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.callback()(lambda: None)

    def command(as_json: bool = typer.Option(False, "--json")) -> None:
        function()  # type: ignore[operator]

    app.command("fails")(command)
    monkeypatch.setattr(app_module, "app", app)


def test_json_has_errors_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise errors.BundleError("no bundle in ünknown")

    with_command(monkeypatch, fails)
    assert main(["fails", "--json"]) == 4
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": "no bundle in ünknown", "exit_code": 4}
    assert out.isascii()
    assert err == "error: no bundle in ünknown\n"

    assert main(["fails", "extra", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == 2 and "see `moebius-edge fails --help`" in document["error"]


def test_interrupts_and_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with_command(monkeypatch, interrupted)
    assert main(["fails"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted, nothing written"

    def hungry() -> None:
        raise MemoryError("Unable to allocate 3.00 TiB")

    with_command(monkeypatch, hungry)
    assert main(["fails"]) == 3
    assert "error: not enough memory (Unable to allocate 3.00 TiB): close" in capsys.readouterr().err


def test_an_interrupt_in_disguise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiled modules make Ctrl-C in their import an ImportError, and we that a missing package."""
    for disguise in (ImportError("numpy C-extensions failed"), errors.MachineError("onnxruntime is missing")):

        def fails(disguise: Exception = disguise) -> None:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt:
                raise disguise from None

        with_command(monkeypatch, fails)
        assert main(["fails"]) == 130
        assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_typer_is_there() -> None:
    """Nothing but the standard library may stand between the start and the handler."""
    done = fresh(
        "import sys, moebius_edge.cli; print([m for m in ('typer', 'rich', 'click') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def buggy() -> None:
        raise ZeroDivisionError("ours")

    with_command(monkeypatch, buggy)
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["fails"])


OUTPUT_COMMANDS = ("--help", "doctor", "inspect tiny --json")


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """A command line of bash, in which ``moebius-edge`` is this program; the pipe's first failure is its exit code."""
    program = f"moebius-edge() {{ '{sys.executable}' -m moebius_edge \"$@\"; }}; set -o pipefail; "
    return subprocess.run(["bash", "-c", program + command], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("where", [">/dev/full", ">&-"])
@pytest.mark.parametrize("command", OUTPUT_COMMANDS)
def test_a_full_or_closed_stdout_is_one_line(command: str, where: str) -> None:
    done = shell(f"moebius-edge {command} {where}")
    reason = "No space left on device" if "full" in where else "Bad file descriptor"
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"error: cannot write to standard output ({reason})")


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize("command", OUTPUT_COMMANDS)
def test_a_reader_that_has_gone_ends_it_quietly(command: str) -> None:
    done = shell(f"(sleep 0.1; moebius-edge {command}) | true")
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "2>&- <&-", "2>&- >&-", "2>/dev/full >/dev/full"])
def test_an_error_that_cannot_be_printed_keeps_its_exit_code(where: str) -> None:
    done = shell(f"moebius-edge run missing missing {where}")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


@pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX")
def test_closed_descriptors_are_not_given_to_our_files(tmp_path: Path) -> None:
    """A file that were opened as descriptor 1 would get what compiled code prints."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nfrom moebius_edge import cli\nfrom moebius_edge.commands import app as module\n"
        "def app(**options):\n"
        "    with open(sys.argv[1], 'w') as stream:\n"
        "        stream.write(str(stream.fileno() > 2))\n"
        "module.app = app\nsys.exit(cli.main())\n"
    )
    done = shell(f"'{sys.executable}' {program} {tmp_path}/a.txt <&- >&-")
    assert (done.returncode, (tmp_path / "a.txt").read_text()) == (0, "True")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("signals", "code", "line"),
    [
        (("SIGINT",), 130, "interrupted, nothing written"),
        (("SIGTERM",), 143, "terminated, nothing written"),
        (("SIGHUP",), 129, "terminated, nothing written"),
        (("SIGINT", "SIGINT", "SIGTERM", "SIGHUP"), 130, "interrupted, nothing written"),
    ],
)
def test_a_signal_cleans_up_even_if_another_comes(
    signals: tuple[str, ...], code: int, line: str, tmp_path: Path
) -> None:
    program = (
        "import sys, time\n"
        "from moebius_edge.commands import app as module\nfrom moebius_edge import cli\nfrom moebius_edge.system import files\n"
        "def app(**options):\n"
        "    with files.atomic_write('a.txt') as file, files.atomic_directory('b'):\n"
        "        file.write_text('half'); print('ready', flush=True)\n"
        "        try: time.sleep(60)\n"
        "        finally: sys.stdin.read()\n"
        "module.app = app\nsys.exit(cli.main())\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for name in signals:
        process.send_signal(getattr(signal, name))
        time.sleep(0.1)
    _, err = process.communicate("", timeout=30)  # the cleaning ends with its input
    assert (process.returncode, err) == (code, f"{line}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="a folder in use cannot be removed elsewhere")
def test_a_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    done = shell(f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; moebius-edge doctor")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert done.stderr.startswith("error: the current folder is gone")


def test_a_name_no_encoding_can_print_is_an_error_not_a_crash(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe9.png")
    command = [sys.executable, "-m", "moebius_edge", "run", name, name]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 3
    assert done.stderr.startswith(b"error: there is no image") and b"Traceback" not in done.stderr
    assert b"/\\xff\\xe9.png: check the path" in done.stderr


def test_colour_is_for_terminals_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console.note("seen")
    monkeypatch.setenv("NO_COLOR", "1")
    console.note("plain")
    assert capsys.readouterr().err == "\033[33mnote:\033[0m seen\nnote: plain\n"


def test_progress_lines_are_few(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with console.progress() as update:
        update("photo.png", 0, 0)
        for step in range(1, 20):
            now[0] += 1
            update("photo.png", step, 19)
    assert capsys.readouterr().err.splitlines() == [
        "photo.png",
        "photo.png: 5 of 19",
        "photo.png: 10 of 19",
        "photo.png: 15 of 19",
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (20_100_000, "20.1 MB"), (3e12, "3.0 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert console.size(count) == text
