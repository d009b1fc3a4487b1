"""The service under load and with faults: how much of the device's own rate is left, and what does not hold.

    python -m benchmarks.serve_load [--bundle tiny] [--seconds 120] [--clients 4 16 64] [--malformed 1000]

starts ``moebius-edge serve`` on loopback and posts one picture of 256x256 again and again: every client waits for its
answer, and after a 429 for as long as Retry-After says. A load comes in rounds; before each of them the device's own
rate is measured by the same pictures, one at a time in a process without HTTP, since other work on the machine changes
it from minute to minute. Then come faults: clients that leave, malformed uploads (changed pictures and changed forms,
by seed), and the worker killed. The last line is the figures as JSON.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from mutations import change_bytes, change_start, corpus, with_checksums  # noqa: E402

FIELDS = {"start": "prefill", "steps": "10"}
BOUNDARY = b"----moebius"


def sample(side: int = 256) -> tuple[bytes, bytes]:
    """A photograph's middle and a mask of one window, as PNG files."""
    photograph = Image.open(ROOT / "examples" / "coffee.png").convert("RGB")
    left, top = (photograph.width - side) // 2, (photograph.height - side) // 2
    mask = np.zeros((side, side), np.uint8)
    mask[side // 3 : side // 2, side // 4 : 3 * side // 4] = 255
    return tuple(coded(i) for i in (photograph.crop((left, top, left + side, top + side)), Image.fromarray(mask)))  # type: ignore[return-value]


def coded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def form(image: bytes, mask: bytes, fields: dict[str, str]) -> bytes:
    head = b"--" + BOUNDARY + b'\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    parts = [head % (name, b'; filename="x"', data) for name, data in ((b"image", image), (b"mask", mask))]
    parts += [head % (name.encode(), b"", text.encode()) for name, text in fields.items()]
    return b"".join(parts) + b"--" + BOUNDARY + b"--\r\n"


class Service:
    def __init__(self, bundle: str, *options: str) -> None:
        command = [sys.executable, "-m", "moebius_edge", "serve", "--bundle", bundle, "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().strip().rpartition(":")[2])

    def post(self, body: bytes, timeout: float = 300) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        kind = f"multipart/form-data; boundary={BOUNDARY.decode()}"
        try:
            connection.request("POST", "/v1/inpaint", body, {"Content-Type": kind})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def leave(self, body: bytes, seconds: float) -> None:
        """Send a request and go away without its answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request(
            "POST", "/v1/inpaint", body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}
        )
        time.sleep(seconds)
        connection.close()

    def workers(self) -> list[int]:
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(word) for path in tasks for word in path.read_text().split()]

    def processor_s(self) -> float:
        """Seconds that the processor has worked for the service and its processes."""
        total = 0
        for pid in (self.process.pid, *self.workers()):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self) -> int:
        """Resident, of the service and its processes. Looking closer (PSS) would stop their allocations meanwhile."""
        total = 0
        for pid in (self.process.pid, *self.workers()):
            try:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except OSError:  # it has just ended
                continue
            total += pages * os.sysconf("SC_PAGE_SIZE")
        return total

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


@dataclass
class Load:
    """What ``clients`` clients met, over all rounds.

    ``seconds`` are of answered pictures. ``pictures`` came in ``span_s`` seconds, each round counted from its first to
    its last answer, and ``device_s`` is how long the device has worked on them.
    """

    clients: int
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    pictures: int = 0
    span_s: float = 0.0
    device_s: float = 0.0
    memory: list[int] = field(default_factory=list)
    done: list[tuple[float, float]] = field(default_factory=list)  # of this round: when, and the device's seconds
    lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self, service: Service, body: bytes, end: float) -> None:
        while (now := time.monotonic()) < end:
            try:
                status, headers, _ = service.post(body)
            except OSError as error:
                with self.lock:
                    self.statuses[type(error).__name__] += 1
                continue
            with self.lock:
                self.statuses[str(status)] += 1
                if status == 200:
                    self.seconds.append(time.monotonic() - now)
                    self.done.append((time.monotonic(), json.loads(headers["X-Moebius-Timing"])["total_ms"] / 1e3))
            if status == 429:
                time.sleep(
                    min(float(headers["Retry-After"]) * random.uniform(0.8, 1.2), max(0.0, end - time.monotonic()))
                )

    def run(self, service: Service, body: bytes, seconds: float) -> None:
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self.client, args=(service, body, end)) for _ in range(self.clients)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            self.memory.append(service.memory_bytes())
            time.sleep(0.5)
        for thread in threads:
            thread.join()
        (first, _), *later = sorted(self.done)
        self.done.clear()
        if later:
            self.pictures += len(later)
            self.span_s += later[-1][0] - first
            self.device_s += sum(device_s for _, device_s in later)

    def figures(self, own_rate: float) -> dict[str, Any]:
        half = len(self.memory) // 2
        first, second = (float(np.median(part)) for part in (self.memory[half // 2 : half], self.memory[half:]))
        p50, p99 = np.percentile(self.seconds, [50, 99])
        return {
            "clients": self.clients,
            "answers": dict(self.statuses),
            "pictures_per_s": round(self.pictures / self.span_s, 3),
            "own_rate": round(own_rate, 3),
            "of_own_rate": round(self.pictures / self.span_s / own_rate, 3),
            "device_busy": round(self.device_s / self.span_s, 3),
            "p50_s": round(float(p50), 2),
            "p99_s": round(float(p99), 2),
            "memory_mb": [round(first / 1e6), round(second / 1e6)],
            "memory_peak_mb": round(max(self.memory) / 1e6),
        }


def own_rate(bundle: str, seconds: float) -> tuple[float, float]:
    """Pictures a second without a service, decoding and encoding included, and the processor's seconds for one."""
    code = f"""
import io, time
from benchmarks.serve_load import sample
from moebius_edge import Inpainter
from moebius_edge.imaging.mask_files import read_mask
from moebius_edge.imaging.pictures import encode_picture, read_picture
image, mask = sample()
with Inpainter({bundle!r}) as inpainter:
    settings = inpainter.bundle.settings(start={FIELDS["start"]!r}, steps={int(FIELDS["steps"])})
    def once():
        picture = read_picture("image", io.BytesIO(image))
        hole, _ = read_mask("mask", picture, contents=io.BytesIO(mask))
        encode_picture(io.BytesIO(), "PNG", inpainter.inpaint(picture, hole, **settings).picture)
    once()
    begin, processor, count = time.monotonic(), time.process_time(), 0
    while time.monotonic() - begin < {seconds}:
        once()
        count += 1
    print(count / (time.monotonic() - begin), (time.process_time() - processor) / count)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    rate, processor_s = map(float, done.stdout.split())
    return rate, processor_s


def malformed(service: Service, body: bytes, count: int) -> dict[str, Any]:
    """Uploads with changed pictures and changed forms; what is answered, and the service's memory around them."""
    statuses: Counter[str] = Counter()
    pictures, before, slowest = sorted(corpus().items()), service.memory_bytes(), 0.0
    mask = coded(Image.fromarray(np.pad(np.full((20, 24), 255, np.uint8), ((20, 20), (24, 24)))))  # of their size
    most = before
    for seed in range(count):
        rng = random.Random(seed)
        if rng.random() < 0.3:
            changed = change_bytes(body, rng)[1]
        else:
            damaged = with_checksums(change_start(rng.choice(pictures)[1], rng, (64, 600))[1])
            files = (damaged, mask) if rng.random() < 0.7 else (rng.choice(pictures)[1], damaged)
            changed = form(*files, {"steps": "2", "start": "noise"})
        begin = time.monotonic()
        try:
            status, _, answer = service.post(changed, timeout=60)
            statuses[str(status)] += 1
            if status != 200:
                assert json.loads(answer).keys() == {"error", "remedy"}, answer
        except OSError as error:
            statuses[type(error).__name__] += 1
        slowest, most = max(slowest, time.monotonic() - begin), max(most, service.memory_bytes())
    after = service.memory_bytes()
    memory = {"memory_mb": [round(b / 1e6) for b in (before, after)], "memory_peak_mb": round(most / 1e6)}
    return {"uploads": count, "answers": dict(statuses), "slowest_s": round(slowest, 2), **memory}


def faults(service: Service, body: bytes) -> dict[str, Any]:
    """Clients that leave in the middle; then the worker killed in the middle."""
    service.post(body)
    begin = time.monotonic()
    service.post(body)
    alone = time.monotonic() - begin
    for _ in range(20):
        service.leave(body, alone / 20)
    begin = time.monotonic()
    status, _, _ = service.post(body)
    after_leaving = {"status": status, "seconds": round(time.monotonic() - begin, 2), "alone_s": round(alone, 2)}
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(service.post(body)[0]))
    thread.start()
    time.sleep(alone / 2)
    for pid in service.workers():
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    thread.join()
    answers.append(service.post(body)[0])
    killed = {"statuses": answers, "until_the_next_picture_s": round(time.monotonic() - begin, 2)}
    return {"after_20_clients_left": after_leaving, "worker_killed": killed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="tiny")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clients", type=int, nargs="*", default=[4, 16, 64])
    parser.add_argument("--malformed", type=int, default=1000)
    options = parser.parse_args()
    body, results = form(*sample(), FIELDS), {"cores": os.cpu_count(), "seconds": options.seconds, "loads": []}
    service = Service(options.bundle)
    try:
        service.post(body)
        for clients in options.clients:
            load, own, before = Load(clients), [], service.processor_s()
            for _ in range(options.rounds):
                own.append(own_rate(options.bundle, options.seconds / options.rounds / 2))
                load.run(service, body, options.seconds / options.rounds)
            rate, own_s = np.mean(own, axis=0).tolist()
            figures = load.figures(rate)
            figures["processor_s"] = round((service.processor_s() - before) / len(load.seconds), 3)
            figures["own_processor_s"] = round(own_s, 3)
            results["loads"].append(figures)
            print(json.dumps(results["loads"][-1]), flush=True)
        results["faults"] = faults(service, body)
        print(json.dumps(results["faults"]), flush=True)
        results["malformed"] = malformed(service, body, options.malformed)
    finally:
        results["exit_code"] = service.end()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
