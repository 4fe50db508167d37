"""Many images through one model: threads decode and write while the calling thread predicts batches of one size."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from smp_ensemble.exceptions import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from smp_ensemble.inference.files import InputImage
    from smp_ensemble.inference.tables import Row

IN_FLIGHT_BYTES = 512 * 2**20
"""About so much memory holds decoded images and their probabilities, however many images there are."""

Array: TypeAlias = npt.NDArray[np.generic]
Size: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Steps:
    """What happens to each image, in this order. An `InputError` concerns that image alone; anything else ends it all.

    Attributes:
        measure: Its height and width, from its header; in a thread.
        read: Its pixels `(H, W, C)`; in a thread.
        run: A prediction for each of several images of one shape and type; in the calling thread.
        finish: From an image, its pixels and its prediction to files, and to its row of a table; in a thread.
        large: Asked with each image's size, in the calling thread: None, or what predicts and writes that image and
            gives its row, in place of the other steps; in the calling thread, with no image decoded for it.
    """

    measure: Callable[[InputImage], Size]
    read: Callable[[InputImage], Array]
    run: Callable[[Sequence[Array]], Sequence[Any]]
    finish: Callable[[InputImage, Array, Any], Row | None]
    large: Callable[[InputImage, Size], Callable[[], Row | None] | None] = lambda _image, _size: None


@dataclass(frozen=True)
class Limits:
    """How much is done at a time.

    Attributes:
        batch_size: Images that `run` gets at once, at most.
        threads: That read and write.
        pixels: Of images that are decoded and not written yet; an image with more has the memory to itself.
    """

    batch_size: int = 8
    threads: int = 4
    pixels: int = IN_FLIGHT_BYTES // 16

    @property
    def patience(self) -> int:
        """An image waits for others of its size until so many have come after it."""
        return 16 * self.batch_size

    @property
    def ahead(self) -> int:
        """An image is not begun before the one so many places before it is finished, so that no rows pile up."""
        return 2 * self.patience + 8 * self.threads


@dataclass(frozen=True)
class Outcome:
    """What became of an image.

    Attributes:
        image: Which.
        row: Of the table, where there is one.
        error: Why there is no result; None: there is one.
    """

    image: InputImage
    row: Row | None = None
    error: str | None = None


@dataclass(frozen=True)
class _Job:
    """An image on its way.

    Attributes:
        index: Its place among all images.
        image: Which.
        pixels: What it takes of the budget; 0 before that is known.
    """

    index: int
    image: InputImage
    pixels: int = 0


class Pipeline:
    """Images to outcomes, in the order of the images, whatever is done first.

    The calling thread coordinates: it hands decoding and writing to threads and runs the model itself. Which images
    form a batch follows from their sizes and their order alone, never from what was faster: the same call gives the
    same batches. A batch is run when it is full, when its first image has waited for `Limits.patience` others, when
    waiting images fill half of the memory, and at the end.

    Args:
        images: All of them.
        steps: What is done.
        limits: How much at a time.
    """

    def __init__(self, images: Sequence[InputImage], steps: Steps, limits: Limits) -> None:
        self._images = images
        self._steps = steps
        self._limits = limits
        self._pool = ThreadPoolExecutor(limits.threads, thread_name_prefix="images")
        self._wake = threading.Event()  # a thread has finished something
        self._headers: deque[tuple[_Job, Future[Size]]] = deque()
        self._next: _Job | None = None  # measured, and waiting for memory
        self._reads: deque[tuple[_Job, Future[Array]]] = deque()
        self._written: deque[tuple[_Job, Future[Row | None]]] = deque()
        self._writing = 0
        self._large: deque[tuple[_Job, Callable[[], Row | None]]] = deque()
        self._buckets: dict[tuple[Any, ...], list[tuple[_Job, Array]]] = {}  # in the order of their first images
        self._batches: deque[list[tuple[_Job, Array]]] = deque()
        self._in_flight = self._waiting = 0  # pixels: of all decoded or being decoded, of those in buckets
        self._outcomes: dict[int, Outcome] = {}
        self._begun = self._emitted = 0

    def outcomes(self) -> Generator[Outcome, None, None]:
        """One for each image; closing the iterator, or an exception, stops all threads before it returns."""
        try:
            while self._emitted < len(self._images):
                self._wake.clear()
                try:
                    self._release()
                except Exception:
                    yield from self._ready()  # what is finished stays so
                    raise
                self._begin()
                self._admit()
                if self._large:
                    job, work = self._large.popleft()
                    self._note(job, work)
                elif batch := self._next_batch():
                    self._predict(batch)
                elif self._emitted not in self._outcomes:
                    self._wake.wait()
                yield from self._ready()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _ready(self) -> Iterator[Outcome]:
        """The outcomes that come next and are there."""
        while self._emitted in self._outcomes:
            yield self._outcomes.pop(self._emitted)
            self._emitted += 1

    def _submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future = self._pool.submit(work, *arguments)
        future.add_done_callback(lambda _: self._wake.set())
        return future

    def _note(self, job: _Job, result: Callable[[], Row | None]) -> None:
        """Keeps what became of an image: the row that `result` gives, or its error."""
        try:
            self._outcomes[job.index] = Outcome(job.image, result())
        except InputError as error:
            self._fail(job, error)

    def _fail(self, job: _Job, error: InputError) -> None:
        self._outcomes[job.index] = Outcome(job.image, error=str(error))

    def _release(self) -> None:
        """Takes note of what is written, and gives its memory to others; what ends it all is raised at the end."""
        fatal: Exception | None = None
        while self._written:
            job, future = self._written.popleft()
            self._writing -= 1
            self._in_flight -= job.pixels
            try:
                self._note(job, future.result)
            except Exception as error:  # noqa: BLE001 (raised below)
                fatal = fatal or error
        if fatal is not None:
            raise fatal

    def _begin(self) -> None:
        """Has headers read, far enough ahead of what is finished."""
        stop = min(len(self._images), self._emitted + self._limits.ahead)
        for index in range(self._begun, stop):
            job = _Job(index, self._images[index])
            self._headers.append((job, self._submit(self._steps.measure, job.image)))
        self._begun = max(self._begun, stop)

    def _admit(self) -> None:
        """Has images decoded in their order, as many as there is memory for."""
        while self._next or (self._headers and self._headers[0][1].done()):
            if self._next is None:
                self._next = self._sized(*self._headers.popleft())
            elif self._in_flight and self._in_flight + self._next.pixels > self._limits.pixels:
                return
            else:
                job, self._next = self._next, None
                self._in_flight += job.pixels
                self._reads.append((job, self._submit(self._steps.read, job.image)))

    def _sized(self, job: _Job, header: Future[Size]) -> _Job | None:
        """An image with its size; None if it goes no further on the common way."""
        try:
            size = header.result()
            work = self._steps.large(job.image, size)
        except InputError as error:
            self._fail(job, error)
            return None
        if work is None:
            return replace(job, pixels=size[0] * size[1])
        self._large.append((job, work))
        return None

    def _next_batch(self) -> list[tuple[_Job, Array]] | None:
        """The next batch; None as long as an image is being decoded that may belong to it."""
        while not self._batches:
            if self._reads:
                if not self._reads[0][1].done():
                    return None
                job, future = self._reads.popleft()
                try:
                    self._put(job, future.result())
                except InputError as error:
                    self._in_flight -= job.pixels
                    self._fail(job, error)
                    self._admit()  # what has room now may belong to the next batch, however late this was noticed
            elif self._buckets and self._no_more_come():
                self._flush(next(iter(self._buckets)))
            else:
                return None
        return self._batches.popleft()

    def _no_more_come(self) -> bool:
        """Whether images in buckets wait in vain: all others are done, or have no room before these are gone."""
        if self._next or not self._headers:
            return not self._writing or (self._next is None and self._begun == len(self._images))
        return False

    def _put(self, job: _Job, pixels: Array) -> None:
        """Adds an image to those of its size, and makes a batch of what need not or cannot wait longer."""
        key = (pixels.shape, pixels.dtype.str)
        bucket = self._buckets.setdefault(key, [])
        bucket.append((job, pixels))
        self._waiting += job.pixels
        if len(bucket) == self._limits.batch_size:
            self._flush(key)
        while self._buckets:
            oldest = next(iter(self._buckets))
            if job.index - self._buckets[oldest][0][0].index >= self._limits.patience:
                self._flush(oldest)
            elif 2 * self._waiting > self._limits.pixels:
                self._flush(max(self._buckets, key=lambda one: len(self._buckets[one])))
            else:
                return

    def _flush(self, key: tuple[Any, ...]) -> None:
        batch = self._buckets.pop(key)
        self._waiting -= sum(job.pixels for job, _ in batch)
        self._batches.append(batch)

    def _predict(self, batch: list[tuple[_Job, Array]]) -> None:
        """Runs the model, and hands the results to the threads that write."""
        try:
            results = self._steps.run([pixels for _, pixels in batch])
        except InputError as error:  # one shape, one reason
            for job, _ in batch:
                self._in_flight -= job.pixels
                self._fail(job, error)
            return
        for (job, pixels), result in zip(batch, results, strict=True):
            self._writing += 1
            future = self._pool.submit(self._steps.finish, job.image, pixels, result)
            future.add_done_callback(partial(self._after_writing, job))

    def _after_writing(self, job: _Job, future: Future[Row | None]) -> None:
        self._written.append((job, future))  # in the writing thread; a deque takes that
        self._wake.set()
