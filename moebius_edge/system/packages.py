"""What brings a package that is missing to this machine, as an error or ``doctor`` says it.

Not every package has a wheel for every machine; a build for CUDA 13 needs a driver that knows it; the builds of ONNX
Runtime overwrite each other; and on a Jetson CUDA and TensorRT are JetPack's. So all such advice comes from here.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from contextlib import suppress
from typing import NamedTuple

from . import machine
from .jetson import read_board
from .machine import package_version, read_text
from .nvml import gpus

CUDA_13_DRIVER = 580  # the oldest branch of NVIDIA's driver that knows CUDA 13
_ON_CUDA = ("gpu", "tensorrt", "rtx")  # extras, each also as NAME-cu12
# The aarch64 wheel of onnxruntime-gpu, 1.31.1, is for CUDA 13 and Python 3.11 and newer.
_ARM_PYTHON = (3, 11)
_JETSON = {  # extra -> where a Jetson gets it
    "gpu": "docs/jetson.md says which build of onnxruntime-gpu fits a Jetson",
    "tensorrt": "run `sudo apt install python3-libnvinfer`, and make the environment with --system-site-packages",
    "rtx": "TensorRT for RTX has no build for a Jetson, use tensorrt",
    "export": "a Jetson needs no PyTorch, export on a workstation",
    "train": "a Jetson needs no PyTorch, train on a workstation",
}


class Advice(NamedTuple):
    """A ``command`` that installs something here, or, where there is none, the ``reason``."""

    command: str
    reason: str = ""

    def after(self, detail: str) -> str:
        """``detail`` with the reason, where there is one."""
        return f"{detail}; {self.reason}" if self.reason else detail

    def __str__(self) -> str:
        return f"run `{self.command}`" if self.command else self.reason


def install(extra: str) -> Advice:
    """What brings the extra ``extra`` of this package."""
    if read_board() is not None and extra in _JETSON:
        return Advice("", _JETSON[extra])
    old = needs_cuda_12()
    arm = platform.machine() not in ("x86_64", "AMD64")
    if arm and extra in _ON_CUDA and (extra != "gpu" or old or sys.version_info < _ARM_PYTHON):
        python = platform.python_version()
        return Advice("", f"no package of it fits {platform.machine()}, Python {python} and the driver")
    name = f"{extra}-cu12" if extra in _ON_CUDA and old else extra
    builds = [build for build in ("onnxruntime", "onnxruntime-gpu") if package_version(build)]
    if extra == "gpu" and "onnxruntime" in builds:  # which deletes files of the other as well
        return Advice(f'pip uninstall -y {" ".join(builds)} && pip install "moebius-edge[{name}]"')
    if extra in ("export", "train") and not builds:
        name = f"cpu,{extra}"
    return Advice(f'pip install "moebius-edge[{name}]"')


def mend_onnxruntime(option: str) -> Advice:
    """What brings the build of ONNX Runtime that is installed anew, with pip's ``option``; never another build."""
    if not package_version("onnxruntime-gpu"):
        return Advice(f"pip install {option} onnxruntime")
    if read_board() is not None:
        return Advice("", "docs/jetson.md has versions of onnxruntime-gpu, numpy and OpenCV that go together")
    return Advice(f'pip install {option} "onnxruntime-gpu[cuda,cudnn]{"<1.27" if needs_cuda_12() else ""}"')


def driver_version() -> str | None:
    """NVIDIA's driver, such as 570.86.15: the kernel's, else NVML's, for a container may lack either."""
    match = re.search(r"Kernel Module\s.*?(\d{3,}\.\d+(\.\d+)?)", read_text(machine.DRIVER_FILE) or "")
    return match[1] if match else next((gpu.driver for gpu in gpus()), None)


def cuda_version() -> int | None:
    """The newest CUDA that the driver's library knows, 12080 for 12.8; None without it. No GPU is needed for this.

    A container may bring a newer library than the kernel's driver, and then it counts.
    """
    version = ctypes.c_int()
    with suppress(OSError, AttributeError):
        if not ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return version.value or None
    return None


def needs_cuda_12() -> bool:
    """Whether the driver is too old for packages built on CUDA 13."""
    if (version := cuda_version()) is not None:
        return version < 13000
    branch = re.match(r"\d+", driver_version() or "")
    return branch is not None and int(branch[0]) < CUDA_13_DRIVER


def too_new(name: str) -> str:
    """Why the build of ``name``, tensorrt or tensorrt-rtx, that is installed is not for this driver; empty if it is."""
    if not package_version(f"{name}-cu13") or not needs_cuda_12():
        return ""
    return f"{name}-cu13 is for CUDA 13, and NVIDIA's driver ({driver_version() or 'unknown'}) knows CUDA 12"


def install_older(name: str, extra: str) -> Advice:
    """What puts the build for CUDA 12 in the place of that for CUDA 13; their files overwrite each other."""
    parts = [name, *(f"{name}-cu13{part}" for part in ("", "-libs", "-bindings"))]
    there = " ".join(part for part in parts if package_version(part))
    return Advice(f'pip uninstall -y {there} && pip install "moebius-edge[{extra}-cu12]"')


def in_container() -> bool:
    """Whether Docker, Podman or Kubernetes started this process."""
    return os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv") or "KUBERNETES_PORT" in os.environ
