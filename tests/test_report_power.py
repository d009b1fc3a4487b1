"""The meter on sources whose power is known: integrated, counted, failing, absent."""

from __future__ import annotations

import threading
import time

import pytest

from moebius_edge.report.meter import Meter, Sample, Source, SourceError, _integrate


class Known(Source):
    """Tells what ``script`` holds, then its last again; ``fails`` at that sample."""

    name, covers, power_mode, power_limit_watts = "known", "a resistor", "MAXN (0)", 25.0

    def __init__(self, *script: Sample, paced: bool = False, fails: int | None = None) -> None:
        self.script, self.paced, self.fails = list(script), paced, fails
        self.opened = self.closed = self.taken = 0
        self._wake = threading.Event()

    def open(self) -> None:
        self.opened += 1
        self.taken = 0
        self._wake.clear()

    def sample(self) -> Sample:
        if self.paced and self._wake.wait(0.01):
            raise SourceError("closed")
        if self.taken == self.fails:
            raise SourceError("it broke: mend it")
        self.taken += 1
        return self.script[min(self.taken, len(self.script)) - 1]

    def close(self) -> None:
        self.closed += 1
        self._wake.set()


def run(source: Source | None, seconds: float = 0.1, reason: str = "") -> Meter:
    meter = Meter(source, reason, period_s=0.01)
    with meter:
        time.sleep(seconds)
    return meter


@pytest.mark.parametrize("paced", [False, True])
def test_constant_power(paced: bool) -> None:
    source = Known(Sample(watts=10.0), paced=paced)
    energy = run(source).energy()
    assert energy.joules == pytest.approx(10 * energy.seconds) and energy.seconds >= 0.1
    assert energy.mean_watts == pytest.approx(10) and energy.max_watts == 10
    assert energy.samples > 3 and (source.opened, source.closed) == (1, 1)
    assert (energy.source, energy.covers, energy.reason) == ("known", "a resistor", None)


def test_the_trapezoidal_rule() -> None:
    """5 W for a second, then to 15 W within two; the block was half a second longer than its samples."""
    readings = [(0.0, Sample(watts=5.0)), (1.0, Sample(watts=5.0)), (3.0, Sample(watts=15.0))]
    joules, most = _integrate(readings, 3.5)
    assert joules == pytest.approx((5 * 1 + 10 * 2) / 3 * 3.5) and most == 15
    assert _integrate(readings[:1], 2.0) == (10.0, 5.0), "one sample stands for all"
    assert _integrate([], 2.0) == (None, None)


def test_a_counter_is_preferred_to_samples() -> None:
    readings = [(0.0, Sample(watts=50.0, joules=1000.0)), (1.0, Sample(watts=90.0, joules=1020.0)),
                (2.0, Sample(watts=50.0, joules=1030.0))]  # fmt: skip
    assert _integrate(readings, 2.0) == (30.0, 90.0)
    counted = [(t, Sample(joules=s.joules)) for t, s in readings]
    assert _integrate(counted, 2.0) == (30.0, 20.0), "the most is the steepest step's"
    assert _integrate(counted, 1.0)[0] == 15.0, "read over two seconds, of a block of one"


def test_what_else_was_seen() -> None:
    hot = Sample(watts=8.0, clocks_mhz={"gpu": 900.0}, temperature_c=71.0, throttles=("power cap",))
    cool = Sample(watts=4.0, clocks_mhz={"gpu": 300.0}, temperature_c=50.0, throttles=())
    energy = run(Known(hot, cool)).energy()
    assert energy.max_temperature_c == 71 and 300 < energy.clocks_mhz["gpu"] < 900
    found = energy.to_dict(images=4)
    assert found["throttled"] and found["throttle_reasons"] == ["power cap"]
    assert found["joules_per_image"] == pytest.approx(energy.joules / 4)
    assert (found["power_mode"], found["power_limit_watts"], list(found["clocks"])) == ("MAXN (0)", 25.0, ["gpu_mhz"])
    assert run(Known(cool)).energy().to_dict()["throttled"] is False
    assert run(Known(Sample(watts=1.0))).energy().to_dict()["throttled"] is None


def test_a_meter_is_used_again() -> None:
    meter = run(Known(Sample(watts=2.0)))
    first = meter.energy()
    with meter:
        pass
    assert meter.energy().samples == 2 < first.samples, "the start's and the end's"


def test_a_source_that_breaks() -> None:
    energy = run(Known(Sample(watts=3.0), fails=2)).energy()
    assert energy.reason == "it broke: mend it" and energy.samples == 2
    assert energy.joules == pytest.approx(3 * energy.seconds)
    nothing = run(Known(Sample(watts=3.0), fails=0)).energy()
    assert (nothing.joules, nothing.mean_watts, nothing.reason) == (None, None, "it broke: mend it")


def test_a_source_that_tells_no_power() -> None:
    assert run(Known(Sample())).energy().reason.startswith("known gave no reading of power in 0.1")  # type: ignore[union-attr]


def test_without_a_source() -> None:
    energy = run(None, 0.0, "there is none: buy one").energy()
    assert energy.to_dict() | {"seconds": 0} == {
        "source": None, "covers": None, "seconds": 0, "joules": None, "joules_per_image": None, "mean_watts": None,
        "max_watts": None, "samples": 0, "power_mode": None, "power_limit_watts": None, "clocks": {},
        "max_temperature_c": None, "throttled": None, "throttle_reasons": None, "reason": "there is none: buy one",
    }  # fmt: skip


@pytest.mark.parametrize("paced", [False, True])
def test_an_error_in_the_block_ends_the_thread(paced: bool) -> None:
    source = Known(Sample(watts=1.0), paced=paced)
    with pytest.raises(ZeroDivisionError), Meter(source, period_s=0.01):
        raise ZeroDivisionError
    assert source.closed == 1
    assert not [t for t in threading.enumerate() if t.name == "power meter"]
