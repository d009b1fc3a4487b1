"""The networks, in PyTorch: the Moebius student, the PixelHacker teacher, and loading their checkpoints.

Not imported on the device path.
"""

from __future__ import annotations

from .checkpoint import load_checkpoint
from .config import StudentConfig, TeacherConfig
from .student import Student, build_student
from .teacher import Teacher, build_teacher
from .unet import Denoised

__all__ = [
    "Denoised",
    "Student",
    "StudentConfig",
    "Teacher",
    "TeacherConfig",
    "build_student",
    "build_teacher",
    "load_checkpoint",
]
