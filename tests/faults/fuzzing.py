"""A seeded fuzzer: mutated bytes and mutated JSON, a time limit for each input, and a tally of what came of them."""

from __future__ import annotations

import copy
import json
import os
import signal
import time
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

INPUTS = int(os.environ.get("SMP_ENSEMBLE_FUZZ", "200"))
"""For each reader: a few in the gate, 10,000 in a full run."""

REPORT = os.environ.get("SMP_ENSEMBLE_FUZZ_REPORT", "")
"""A file that one line for each reader is added to."""

SEED = int(os.environ.get("SMP_ENSEMBLE_FUZZ_SEED", "0"))
MOST_SECONDS = 60.0
"""For one input, on a machine that may be busy."""

EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)

DEEP: list = []
for _ in range(40):
    DEEP = [DEEP]

NASTY = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a", "0",
    "none", "no file", "\0", "../x", "../../../etc/passwd", "/etc/passwd", "C:\\x", "\\\\host\\share", "nul",
    "\ud800", "\U0001f4a5", "x" * 300, "x" * 5000, "1e999", "9" * 5000, "d4+d4", "scales:" + ",".join(["1"] * 99),
    [], {}, [[]], [0], [1.0, 2.0, 3.0], [0] * 2000, {"a": {}}, DEEP,
)  # fmt: skip


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """One to eight changes of some bytes: flipped, overwritten, cut, doubled, inserted, moved."""
    data = bytearray(content)
    for _ in range(min(rng.geometric(0.4), 8)):
        at = int(rng.integers(len(data) + 1))
        length = int(min(rng.geometric(0.2), 64))
        match rng.integers(8):
            case 0 if at < len(data):
                data[at] ^= 1 << int(rng.integers(8))
            case 1 if at < len(data):
                data[at] = int(rng.integers(256))
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data[at:at] = rng.bytes(length)
            case 5:
                size = int(rng.choice([1, 2, 4, 8]))
                edge = EDGES[rng.integers(len(EDGES))] % (1 << 8 * size)
                data[at : at + size] = edge.to_bytes(size, "little" if rng.integers(2) else "big")
            case 6:
                del data[at:]
            case 7:
                other = int(rng.integers(len(data) + 1))
                data[at:at] = data[other : other + length]
    return bytes(data)


def mutate_png(content: bytes, rng: np.random.Generator) -> bytes:
    """One chunk of a PNG changed and given its right length and checksum, so that decoders get beyond these."""
    chunks = []
    at = 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += length + 12
    chosen = int(rng.integers(len(chunks)))
    kind, data = chunks[chosen]
    if kind == b"IDAT" and rng.integers(2):
        data = zlib.compress(mutate(zlib.decompress(data), rng))
    elif data:
        data = mutate(data, rng)
    chunks[chosen] = (kind, data)
    if rng.integers(8) == 0:
        chunks.insert(chosen, chunks[rng.integers(len(chunks))])
    return content[:8] + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks
    )


def mutate_json(content: object, rng: np.random.Generator, keys: tuple[str, ...] = (), nasty: tuple = NASTY) -> object:
    """One to three values of a JSON content replaced, removed, doubled or added."""
    content = copy.deepcopy(content)
    for _ in range(rng.integers(1, 4)):
        places = list(_places(content))
        if not places:
            return content
        owner, key = places[rng.integers(len(places))]
        value = copy.deepcopy(nasty[rng.integers(len(nasty))])
        match rng.integers(6):
            case 0:
                del owner[key]
            case 1 if isinstance(owner, list):
                owner.insert(key, copy.deepcopy(owner[key]))
            case 2 if isinstance(owner, dict):
                known = (*keys, *owner, "x")
                owner[known[rng.integers(len(known))]] = value
            case _:
                owner[key] = value
    return content


def _places(content):
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _places(content[key])


def as_json(content: object, rng: np.random.Generator) -> bytes:
    """As a file holds it; one in ten damaged as bytes as well."""
    data = json.dumps(content).encode()
    return mutate(data, rng) if rng.integers(10) == 0 else data


@dataclass
class Tally:
    """What came of a reader's inputs."""

    name: str
    accepted: int = 0
    refused: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    worst: float = 0.0

    @property
    def inputs(self) -> int:
        return self.accepted + self.refused.total()

    def __str__(self) -> str:
        refused = ", ".join(f"{name} {count}" for name, count in self.refused.most_common())
        return (
            f"{self.name}: {self.inputs} inputs, {self.accepted} accepted, refused: {refused or 'none'}; "
            f"{self.seconds:.1f} s, worst {self.worst:.3f} s"
        )


def fuzz(name, make, read, allowed, inputs: int = INPUTS, longest: int = 2000) -> Tally:
    """Reads `inputs` inputs, each from a seed of its own.

    Args:
        name: Of the reader.
        make: The input that a random generator stands for.
        read: The reader.
        allowed: What it may raise.
        inputs: How many.
        longest: Characters that an error may have.

    Raises:
        AssertionError: It raised anything else, or took too long; says which input.
    """
    tally = Tally(name)
    for index in range(inputs):
        rng = np.random.default_rng([SEED, zlib.crc32(name.encode()), index])
        data = make(rng)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(), time_limit():
                warnings.simplefilter("error" if index % 2 else "ignore")
                read(data)
            tally.accepted += 1
        except allowed as error:
            check_message(error, f"input {index} of {name}", longest)
            tally.refused[type(error).__name__] += 1
        except BaseException as error:
            raise AssertionError(f"input {index} of {name}: {type(error).__name__} {str(error)[:300]}") from error
        took = time.perf_counter() - start
        tally.seconds += took
        tally.worst = max(tally.worst, took)
    print(tally)
    if REPORT:
        with Path(REPORT).open("a") as file:
            print(tally, file=file)
    assert tally.inputs == inputs
    return tally


def check_message(error: Exception, where: str, longest: int = 2000) -> None:
    """An error is one line that fits a screen, whatever it speaks of."""
    assert "\n" not in str(error), f"{where}: more than one line: {error}"
    assert len(str(error)) <= longest, f"{where}: {len(str(error))} characters"


@contextmanager
def time_limit(seconds: float = MOST_SECONDS):
    """Raises TimeoutError in what takes longer, where the system has timers."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
