"""The limits that a recommendation keeps to, and how far a configuration misses them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .figures import Configuration, Results, hole_psnr_db, latency_ms, memory_bytes


@dataclass(frozen=True)
class Budget:
    """Limits on one picture; None is no limit. The PSNR is the hole's, by ``figures.against_of``."""

    max_latency_ms: float | None = None
    min_psnr_db: float | None = None
    max_memory_bytes: float | None = None

    @classmethod
    def of(cls, results: Results) -> Budget:
        """The limits that the document states."""
        return cls(**{name: results["limits"][name] for name in ("max_latency_ms", "min_psnr_db", "max_memory_bytes")})

    @property
    def stated(self) -> bool:
        return (self.max_latency_ms, self.min_psnr_db, self.max_memory_bytes) != (None, None, None)

    def text(self) -> str:
        """Such as: at most 500 ms, at least 30 dB in the hole, at most 800 MB."""
        limits = [
            self.max_latency_ms is not None and f"at most {shown_ms(self.max_latency_ms)} an image",
            self.min_psnr_db is not None and f"at least {self.min_psnr_db:g} dB in the hole",
            self.max_memory_bytes is not None and f"at most {shown_mb(self.max_memory_bytes)} of memory",
        ]
        return ", ".join(limit for limit in limits if limit) or "none stated"


def misses(configuration: Configuration, budget: Budget, against: str | None) -> list[tuple[float, str]]:
    """By what factor each limit is missed, and that in words; a level of error counts as its amplitude."""
    found = []
    latency, memory = latency_ms(configuration), memory_bytes(configuration)
    if budget.max_latency_ms is not None and latency is not None and latency > budget.max_latency_ms:
        ratio = latency / budget.max_latency_ms if budget.max_latency_ms > 0 else math.inf
        found.append((ratio, f"{shown_ms(latency)} is over {shown_ms(budget.max_latency_ms)}"))
    if budget.max_memory_bytes is not None:
        if memory is None:
            found.append((math.inf, "its memory was not measured"))
        elif memory > budget.max_memory_bytes:
            ratio = memory / budget.max_memory_bytes if budget.max_memory_bytes > 0 else math.inf
            found.append((ratio, f"{shown_mb(memory)} of memory is over {shown_mb(budget.max_memory_bytes)}"))
    if budget.min_psnr_db is not None:
        if (psnr := hole_psnr_db(configuration, against)) is None:
            found.append((math.inf, "its accuracy was not measured"))
        elif psnr < budget.min_psnr_db:
            ratio = 10 ** ((budget.min_psnr_db - psnr) / 20)
            found.append((ratio, f"{psnr:.1f} dB in the hole is under {budget.min_psnr_db:g} dB"))
    return found


def shown_ms(value: float) -> str:
    """Milliseconds in a sentence."""
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def shown_mb(value: float) -> str:
    """Bytes in a sentence, in MB of 10⁶."""
    return f"{value / 1e6:.0f} MB"
