"""The errors a user can cause or meet, each with the exit code that the command line documents.

Every message says what is wrong, with the values, and what mends it. Anything that is not a
``MoebiusError`` is a bug in this package and keeps its traceback.
"""

from __future__ import annotations


class MoebiusError(Exception):
    """Base of all user-facing errors.

    Args:
        problem: what is wrong, with the values.
        remedy: the command or change that mends it, where the caller has one for a program to read; the text of the
            error is then ``problem: remedy``.

    ``exit_code`` is what the command line returns.
    """

    exit_code = 1

    def __init__(self, problem: str = "", remedy: str = "") -> None:
        super().__init__(f"{problem}: {remedy}" if remedy else problem)
        self.problem, self.remedy = problem, remedy


class UsageError(MoebiusError):
    """An argument or an input file is unusable: wrong option, unreadable image, mask of another size."""

    exit_code = 2


class MachineError(MoebiusError):
    """The machine lacks something: a package, a GPU, a file, disk space, the right to write."""

    exit_code = 3


class OutOfMemory(MachineError):
    """The machine, its GPU or the limit that a user has set has too little memory for the work."""


class BundleError(MoebiusError):
    """A checkpoint, bundle or engine is damaged, unsafe, or does not fit this machine or version."""

    exit_code = 4


class QualityError(MoebiusError):
    """A measured quality gate was missed; nothing was saved."""

    exit_code = 5


class PartialFailure(MoebiusError):
    """Part of a batch failed; the rest was done."""

    exit_code = 6
