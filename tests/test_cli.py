"""The command line as a whole: help in a blink, exit codes, one-line errors, JSON for errors too."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from commanding import Captured

import moebius_edge
from moebius_edge import errors, options
from moebius_edge.cli import main
from moebius_edge.commands import app as app_module
from moebius_edge.commands import console
from moebius_edge.export.int8_ranges import METHODS
from moebius_edge.pipeline.presets import PRESETS
from moebius_edge.report.measure import CLASSICAL
from moebius_edge.runtimes.auto import CANDIDATES
from moebius_edge.runtimes.engine_files import VARIANTS
from moebius_edge.runtimes.openvino import DEVICES as OPENVINO_DEVICES
from moebius_edge.sampling.scheduler import SCHEDULERS

COMMANDS = ("run", "serve", "report", "inspect", "compare", "profile", "doctor", "download", "export", "train")
HEAVY = ("numpy", "cv2", "PIL", "torch", "onnxruntime", "onnx", "huggingface_hub", "rich.markdown")


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_help_imports_nothing_heavy() -> None:
    """Nor does the module: nothing but the standard library may stand between the start and the handler of Ctrl-C."""
    calls = [["--help"], [], ["--version"], *([command, "--help"] for command in COMMANDS)]
    done = fresh(
        "import sys\nfrom moebius_edge.cli import main\n"
        "print([m for m in ('typer', 'rich', 'click') if m in sys.modules])\n"
        f"codes = [main(call) for call in {calls}]\n"
        f"print(codes, [m for m in {HEAVY} if m in sys.modules])"
    )
    first, *_, last = done.stdout.splitlines()
    assert (first, last, done.stderr) == ("[]", f"{[0] * len(calls)} []", "")


def test_help_answers_in_a_blink() -> None:
    """Within 0.3 s. Of CPU time, for a machine busy with other things makes any wall-clock figure wrong."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "moebius_edge", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.3


def test_the_device_path_never_imports_torch() -> None:
    modules = ("cli", "pipeline.inpainter", "bundle.bundle", "imaging.pictures", "runtimes.ort", "commands.app")
    code = "import sys\n" + "".join(f"import moebius_edge.{m}\n" for m in modules)
    done = fresh(code + "print([m for m in ('torch', 'onnx', 'diffusers') if m in sys.modules])")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_help_names_every_command(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert set(COMMANDS) <= listed


def test_every_help_ends_in_two_examples_that_are_valid(capsys: Captured) -> None:
    """Each example is read as the command line would be, without its being executed."""
    group = typer.main.get_command(app_module.app)
    assert [command.__name__ for command in app_module.COMMANDS] == list(COMMANDS)
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        shown = capsys.readouterr().out.partition("Examples:\n")[2]
        typed = [line.strip() for line in shown.splitlines() if line.startswith("    moebius-edge ")]
        assert len(typed) == 2 and all(len(line) < 80 for line in shown.splitlines())
        for example in typed:
            program, command, *arguments = example.split()
            assert (program, command) == ("moebius-edge", name)
            group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_python_m_and_the_version() -> None:
    done = subprocess.run([sys.executable, "-m", "moebius_edge", "--version"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (f"moebius-edge {moebius_edge.__version__}\n", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run", "Missing argument 'IMAGE': see `moebius-edge run --help`"),
        ("runn", "No such command 'runn'"),
        ("inspect", "Missing argument 'BUNDLE'"),
        ("run a b --colour", "No such option: --colour"),
        ("run a b --steps many", "Invalid value for '--steps': "),
        ("run a b --steps 0", "Invalid value for '--steps': "),
        ("run a b --guidance nan", "Invalid value for '--guidance': "),
        *(
            (f"run a b --guidance-interval {x}", f"guidance-interval': '{x}' is not two whole numbers such as")
            for x in ("200", "a,b", "1,2,3", "0.2,0.8")
        ),
        ("run a b --start x", "Invalid value for '--start': 'x' is not one of 'image', 'prefill', 'noise'"),
        ("run a b --runtime caffe", "'caffe' is not one of 'auto', 'onnxruntime', 'openvino', 'tensorrt', 'tensorrt-"),
        ("compare a b --device-a tpu", "Invalid value for '--device-a': 'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        ("export a --precision fp8", "Invalid value for '--precision': 'fp8' is not one of 'fp32', 'fp16', 'int8'"),
        ("train -o run --stage dream", "'dream' is not one of 'teacher', 'student', 'guidance', 'int8'"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(arguments: str, message: str, capsys: Captured) -> None:
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_the_choices_are_those_of_the_modules_that_implement_them() -> None:
    assert tuple(SCHEDULERS) == options.SCHEDULERS
    assert tuple(PRESETS) == options.PRESETS
    assert tuple(VARIANTS) == options.ENGINES
    assert tuple(METHODS) == options.RANGES
    assert set(options.GATE_RUNTIMES) < set(options.RUNTIMES)
    assert set(options.RUNTIMES) == {candidate.runtime for candidate in CANDIDATES}
    assert set(options.BASELINES) == set(CLASSICAL)
    assert set(options.DEVICES) == {candidate.device for candidate in CANDIDATES} | set(OPENVINO_DEVICES)


# --- how a command ends ----------------------------------------------------------------------------------


def with_command(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Let the program have one command, ``fails``."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.callback()(lambda: None)

    def command(as_json: bool = typer.Option(False, "--json")) -> None:
        function()

    app.command("fails")(command)
    monkeypatch.setattr(app_module, "app", app)


def failing(error: BaseException) -> Any:
    def fails() -> None:
        raise error

    return fails


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.UsageError, 2),
        (errors.MachineError, 3),
        (errors.OutOfMemory, 3),
        (errors.BundleError, 4),
        (errors.QualityError, 5),
        (errors.PartialFailure, 6),
        (console.Interrupted, 130),
    ],
)
def test_every_error_has_its_exit_code(
    kind: type[errors.MoebiusError], code: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    with_command(monkeypatch, failing(kind("what is wrong [bold]/tmp/[a]  b.png[/bold]:\n   what mends it")))
    assert main(["fails"]) == code
    prefix = "" if code == 130 else "error: "
    expected = f"{prefix}what is wrong [bold]/tmp/[a]  b.png[/bold]: what mends it\n"
    assert capsys.readouterr() == ("", expected)


def test_json_has_errors_too(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    with_command(monkeypatch, failing(errors.BundleError("no bundle in ünknown", "name another")))
    assert main(["fails", "--json"]) == 4
    out, err = capsys.readouterr()
    line = "no bundle in ünknown: name another"
    assert json.loads(out) == {"error": line, "remedy": "name another", "exit_code": 4} and out.isascii()
    assert err == f"error: {line}\n"
    assert main(["fails", "extra", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == 2 and document["remedy"] == "see `moebius-edge fails --help`"


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted, nothing written"),
        (MemoryError("3.00 TiB"), 3, "error: not enough memory (3.00 TiB): close other programs"),
    ],
)
def test_interrupts_and_memory(
    end: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    with_command(monkeypatch, failing(end))
    assert main(["fails"]) == code
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("disguise", [ImportError("numpy C-extensions failed"), errors.MachineError("it is missing")])
def test_an_interrupt_in_disguise(disguise: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """Compiled modules make Ctrl-C in their import an ImportError, and we that a missing package."""

    def fails() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise disguise from None

    with_command(monkeypatch, fails)
    assert main(["fails"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("bug", [ZeroDivisionError("ours"), FileNotFoundError(2, "ours", "name")])
def test_a_bug_keeps_its_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with_command(monkeypatch, failing(bug))
    with pytest.raises(type(bug), match="ours"):
        main(["fails"])


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "the work needs torch"),
        (ImportError("libfoo.so.1 is missing"), "the work fails (libfoo.so.1 is missing)"),
    ],
)
def test_a_missing_or_broken_package_has_its_command(error: ImportError, what: str) -> None:
    with pytest.raises(errors.MachineError) as raised, console.needs("the work", "extra"):
        raise error
    assert str(raised.value) == f'{what}: run `pip install "moebius-edge[extra]"`'
    ours = ModuleNotFoundError("a bug", name="moebius_edge.nowhere")
    with pytest.raises(ModuleNotFoundError, match="a bug"), console.needs("the work", "extra"):
        raise ours


# --- stdout and stderr -----------------------------------------------------------------------------------

OUTPUT_COMMANDS = ("--help", "inspect tiny --json")


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """A command line of bash, in which ``moebius-edge`` is this program; the pipe's first failure is its exit code."""
    program = f"moebius-edge() {{ '{sys.executable}' -m moebius_edge \"$@\"; }}; set -o pipefail; "
    return subprocess.run(["bash", "-c", program + command], capture_output=True, text=True, timeout=120)


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """The environment of a user whose folder is empty and whose path has ``moebius-edge``."""
    program = tmp_path / "bin" / "moebius-edge"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moebius_edge "$@"\n')
    program.chmod(0o755)
    return {"HOME": str(tmp_path), "PATH": f"{program.parent}:/usr/bin:/bin", "TERM": "dumb", "PS1": "$ "}


def test_completion_is_installed_and_completes_in_bash(home: dict[str, str]) -> None:
    """An interactive shell on a terminal of its own, in which Tab is pressed."""
    import pty

    (Path(home["HOME"]) / "picture.png").touch()
    done = subprocess.run(
        ["bash", "-c", "moebius-edge --install-completion; exit $?"], env=home, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and "bash completion installed in" in done.stdout
    for typed, completed in (("ins\t", "inspect"), ("run --pre\t", "--preset"), ("run --start pre\t", "prefill"),
                             ("run pict\t", "picture.png")):  # fmt: skip
        parent, child = pty.openpty()
        shell = subprocess.Popen(
            ["bash", "-i"], env=home, cwd=home["HOME"], stdin=child, stdout=child, stderr=child, start_new_session=True
        )
        os.close(child)
        os.write(parent, f"moebius-edge {typed}".encode())
        shown, deadline = b"", time.monotonic() + 30
        while completed.encode() not in shown and time.monotonic() < deadline:
            shown += os.read(parent, 4096)
        shell.kill()
        shell.wait()
        os.close(parent)
        assert completed.encode() in shown, shown


@pytest.mark.parametrize(
    ("variables", "code", "shown"),
    [
        ("complete_bash COMP_WORDS='moebius-edge exp' COMP_CWORD=1", 0, "export"),
        ("complete_zsh _TYPER_COMPLETE_ARGS='moebius-edge run --pre'", 0, '"--preset"'),
        ("complete_zsh _TYPER_COMPLETE_ARGS='moebius-edge run ph'", 0, "_files"),
        ("complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args _TYPER_COMPLETE_ARGS='moebius-edge d'", 0, "doctor\t"),
        ("complete_fish _TYPER_COMPLETE_FISH_ACTION=is-args _TYPER_COMPLETE_ARGS='moebius-edge d'", 0, ""),
        ("complete_fish _TYPER_COMPLETE_FISH_ACTION=is-args _TYPER_COMPLETE_ARGS='moebius-edge run ph'", 1, ""),
    ],
)
def test_what_the_shells_scripts_ask_is_answered(variables: str, code: int, shown: str) -> None:
    done = shell(f"export _MOEBIUS_EDGE_COMPLETE={variables}; moebius-edge")
    assert (done.returncode, done.stderr) == (code, "") and shown in done.stdout


def test_a_home_that_takes_no_completion_is_one_line(home: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-c", "moebius-edge --install-completion; exit $?"],
        env={**home, "HOME": "/proc/nowhere"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: completion cannot be installed") and "--show-completion" in done.stderr


@pytest.mark.parametrize("where", [">/dev/full", ">&-"])
@pytest.mark.parametrize("command", OUTPUT_COMMANDS)
def test_a_full_or_closed_stdout_is_one_line(command: str, where: str) -> None:
    done = shell(f"moebius-edge {command} {where}")
    reason = "No space left on device" if "full" in where else "Bad file descriptor"
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"error: cannot write to standard output ({reason})")


@pytest.mark.parametrize("command", OUTPUT_COMMANDS)
def test_a_reader_that_has_gone_ends_it_quietly(command: str) -> None:
    done = shell(f"(sleep 0.1; moebius-edge {command}) | true")
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "2>&- >&- <&-"])
def test_an_error_that_cannot_be_printed_keeps_its_exit_code(where: str) -> None:
    done = shell(f"moebius-edge run missing missing {where}")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


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


@pytest.mark.parametrize(
    ("signals", "code", "line"),
    [
        (("SIGTERM",), 143, "terminated, nothing written"),
        (("SIGHUP",), 129, "terminated, nothing written"),
        (("SIGINT", "SIGINT", "SIGTERM", "SIGHUP"), 130, "interrupted, nothing written"),
    ],
)
def test_a_signal_cleans_up_even_if_another_comes(
    signals: tuple[str, ...], code: int, line: str, tmp_path: Path
) -> None:
    program = (
        "import sys, time\nfrom moebius_edge import cli\nfrom moebius_edge.commands import app as module\n"
        "from moebius_edge.system import files\n"
        "def app(**options):\n"
        "    with files.atomic_write('a.txt') as file, files.atomic_directory('b'):\n"
        "        file.write_text('half'); print('ready', flush=True)\n"
        "        try: time.sleep(60)\n"
        "        finally: sys.stdin.read()\n"
        "module.app = app\nsys.exit(cli.main())\n"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for name in signals:
        process.send_signal(getattr(signal, name))
        time.sleep(0.1)
    _, err = process.communicate("", timeout=30)  # the cleaning ends with its input
    assert (process.returncode, err) == (code, f"{line}\n")
    assert list(tmp_path.iterdir()) == []


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


# --- the console -----------------------------------------------------------------------------------------


def test_progress_lines_are_few(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with console.progress() as on_progress:
        on_progress("photo.png", 0, 0)
        for step in range(1, 20):
            now[0] += 1
            on_progress("photo.png", step, 19)
    lines = ["photo.png", *(f"photo.png: {step} of 19" for step in (5, 10, 15))]
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("bytes", 0, "0 B"),
        ("bytes", 999, "999 B"),
        ("total_bytes", 1000, "1.0 kB"),
        ("memory_bytes", 20_100_000, "20.1 MB"),
        ("bytes", 3e12, "3.0 TB"),
        ("median_ms", 12.34, "12.3"),
        ("median_ms", 123.4, "123"),
        ("psnr_db", 45.0449, "45.04"),
        ("anything", None, ""),
        ("quantised", True, "yes"),
        ("shape", ("N", 4, 8, 8), "N x 4 x 8 x 8"),
        ("drift", [0.5, *range(8), 2.0], "0.5 .. 2 (10 values)"),
        ("gate", {"psnr_db": 99.0, "pixel": {"x": 1, "in_y": 2}, "none": None}, "psnr db 99, pixel.x 1, pixel.in y 2"),
    ],
)
def test_values_are_shown_by_the_unit_in_their_name(name: str, value: Any, text: str) -> None:
    assert console.shown(name, value) == text
