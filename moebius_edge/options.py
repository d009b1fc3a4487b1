"""Every list of choices of the command line, written once.

This module imports nothing of the package, so that ``--help`` and every layer can use it. The commands take the
``Literal`` types; the modules that implement the choices use the tuples, or are compared with them by a test.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

VERBOSE: Final = "MOEBIUS_EDGE_VERBOSE"  # the variable that --verbose sets to 1, for child processes as well
AUTO: Final = "auto"  # as a runtime or a device: the fastest that works on this machine

# What executes a bundle, and where.
Runtime = Literal["auto", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
RUNTIMES: tuple[str, ...] = tuple(name for name in get_args(Runtime) if name != AUTO)
Device = Literal["auto", "cpu", "cuda", "gpu", "npu"]
DEVICES: tuple[str, ...] = tuple(name for name in get_args(Device) if name != AUTO)

# How a picture is sampled.
Start = Literal["image", "prefill", "noise"]
STARTS: tuple[str, ...] = get_args(Start)
Scheduler = Literal["ddim", "dpm++2m"]
SCHEDULERS: tuple[str, ...] = get_args(Scheduler)
Preset = Literal["fast"]
PRESETS: tuple[str, ...] = get_args(Preset)

# What report compares a network with.
BASELINES: tuple[str, ...] = ("telea", "navier-stokes")

# How the masks of a folder are found, and what of a mask file marks the hole.
PairBy = Literal["name", "order"]
PAIR_BY: tuple[str, ...] = get_args(PairBy)
MASK_SOURCES: tuple[str, ...] = ("alpha", "luma", "red", "green", "blue")  # besides index:N

# What export makes.
Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: dict[str, str] = {"fp32": "float32", "fp16": "float16", "int8": "int8"}  # as said -> as in bundle.json
Weights = Literal["fp32", "fp16"]
Engine = Literal["tensorrt", "tensorrt-rtx"]
ENGINES: tuple[str, ...] = get_args(Engine)
LambdaPlugin = Literal["auto", "on", "off"]  # auto is off, until it is measured
GateRuntime = Literal["onnxruntime", "openvino"]
GATE_RUNTIMES: tuple[str, ...] = get_args(GateRuntime)
Ranges = Literal["minmax", "percentile", "entropy", "mse"]
RANGES: tuple[str, ...] = get_args(Ranges)

# What train makes.
Stage = Literal["teacher", "student", "guidance", "int8"]
STAGES: tuple[str, ...] = get_args(Stage)
TrainingDevice = Literal["auto", "cpu", "cuda"]
TrainingPreset = Literal["tiny", "moebius", "upstream"]
