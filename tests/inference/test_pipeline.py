"""The pipeline: every image once, in order, as the plain loop does it, within its memory, and never hanging."""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from smp_ensemble.exceptions import DataError, StorageError
from smp_ensemble.inference.files import InputImage
from smp_ensemble.inference.pipeline import Limits, Outcome, Pipeline, Steps

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3))
FATES = st.sampled_from(["good"] * 6 + ["header", "pixels", "run", "write", "large"])


def images_of(count: int) -> list[InputImage]:
    return [InputImage(f"{index}.png", Path(f"{index}.png")) for index in range(count)]


class Work:
    """Steps on images that are numbers: their pixels hold their index, and each fails where its fate says so."""

    def __init__(self, sizes, fates=None, seed=None):
        self.sizes, self.fates = sizes, fates or ["good"] * len(sizes)
        self.pauses = None if seed is None else np.random.default_rng(seed).random(3 * len(sizes)) * 2e-3
        self.batches = []
        self.threads = set()
        self.lock = threading.RLock()
        self.alive = self.most_alive = 0

    def steps(self) -> Steps:
        return Steps(self.measure, self.read, self.run, self.finish, self.large)

    def _do(self, image, stage, step):
        index = int(image.path.stem)
        self.threads.add(threading.current_thread().name)
        if self.pauses is not None:
            time.sleep(self.pauses[3 * index + stage])
        if self.fates[index] == step:
            raise DataError(f"{step} of {image.name}")
        return index

    def measure(self, image):
        return self.sizes[self._do(image, 0, "header")]

    def read(self, image):
        index = self._do(image, 1, "pixels")
        pixels = np.full((*self.sizes[index], 1), index)
        with self.lock:
            self.alive += pixels.size
            self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(pixels, self._gone, pixels.size)
        return pixels

    def _gone(self, size):
        with self.lock:
            self.alive -= size

    def run(self, arrays):
        assert threading.current_thread() is threading.main_thread()
        assert len({one.shape for one in arrays}) == 1
        self.batches.append([int(one[0, 0, 0]) for one in arrays])
        if any(self.fates[int(one[0, 0, 0])] == "run" for one in arrays):
            raise DataError(f"run of {self.batches[-1]}")
        return [one.sum() for one in arrays]

    def finish(self, image, pixels, result):
        index = self._do(image, 2, "write")
        assert (pixels == index).all()
        assert result == index * pixels.size
        return image.name, str(result)

    def large(self, image, size):
        index = int(image.path.stem)
        if self.fates[index] != "large":
            return None
        assert size == self.sizes[index]
        return lambda: (image.name, "large")


def outcomes_of(work: Work, limits: Limits) -> list[Outcome]:
    with closing(Pipeline(images_of(len(work.sizes)), work.steps(), limits).outcomes()) as outcomes:
        return list(outcomes)


def expected_of(work: Work) -> list[Outcome]:
    """What a plain loop over the images gives, but for the batches that fail."""
    found = []
    for image, (height, width), fate in zip(images_of(len(work.sizes)), work.sizes, work.fates, strict=True):
        index = int(image.path.stem)
        if fate in {"header", "pixels", "write"}:
            found.append(Outcome(image, error=f"{fate} of {image.name}"))
        elif fate == "large":
            found.append(Outcome(image, (image.name, "large")))
        else:
            found.append(Outcome(image, (image.name, str(index * height * width))))
    return found


CASES = st.lists(st.tuples(SIZES, FATES), max_size=40)
LIMITS = st.builds(Limits, st.integers(1, 5), st.integers(1, 4), st.integers(1, 60))


@given(CASES, LIMITS)
def test_every_image_has_its_outcome_in_order_whatever_fails(cases, limits):
    work = Work([size for size, _ in cases], [fate for _, fate in cases])
    failed = {}
    outcomes = outcomes_of(work, limits)
    for batch in work.batches:
        assert len(batch) <= limits.batch_size
        if any(work.fates[index] == "run" for index in batch):
            failed |= dict.fromkeys(batch, f"run of {batch}")
    for index, (found, expected) in enumerate(zip(outcomes, expected_of(work), strict=True)):
        if index in failed:
            assert found == Outcome(expected.image, error=failed[index])
        else:
            assert found == expected


@given(CASES, LIMITS, st.integers(0, 3))
@example(  # the last one has room as soon as the third has failed, when all others may wait already
    [((1, 1), "good"), ((1, 3), "good"), ((2, 3), "pixels"), ((1, 2), "good"), ((1, 1), "good")], Limits(2, 1, 12), 0
)
def test_batches_follow_from_sizes_and_order_alone(cases, limits, seed):
    sizes, fates = [size for size, _ in cases], [fate for _, fate in cases]
    at_once, delayed = Work(sizes, fates), Work(sizes, fates, seed)
    assert outcomes_of(at_once, limits) == outcomes_of(delayed, limits)
    assert at_once.batches == delayed.batches


@given(st.lists(SIZES, max_size=60), LIMITS)
def test_decoded_images_fit_the_memory(sizes, limits):
    work = Work(sizes, seed=0)
    outcomes_of(work, limits)
    assert work.alive == 0
    assert work.most_alive <= max([limits.pixels, *(height * width for height, width in sizes)])


def test_batches_are_full_where_sizes_alternate():
    work = Work([(1, 1), (2, 2)] * 32)
    outcomes_of(work, Limits(8, 2, 1000))
    assert [len(batch) for batch in work.batches] == [8] * 8


def test_a_rare_size_waits_for_its_patience_and_no_longer():
    limits = Limits(batch_size=2, threads=2, pixels=10_000)
    work = Work([(3, 3)] + [(1, 1)] * 200)
    outcomes_of(work, limits)
    before = work.batches.index([0])
    assert before == limits.patience // 2


def test_images_of_sizes_of_their_own_run_singly():
    work = Work([(1, side) for side in range(1, 30)])
    outcomes_of(work, Limits(8, 2, 100))
    assert sorted(work.batches) == [[index] for index in range(29)]


def test_images_of_one_size_and_another_type_run_apart():
    work = Work([(2, 2)] * 4)
    read = work.read
    steps = Steps(
        work.measure, lambda image: read(image).astype([np.uint8, np.float32][int(image.path.stem) % 2]), work.run,
        work.finish,
    )  # fmt: skip
    with closing(Pipeline(images_of(4), steps, Limits(4, 2, 1000)).outcomes()) as outcomes:
        assert all(outcome.error is None for outcome in outcomes)
    assert work.batches == [[0, 2], [1, 3]]


def test_rows_of_later_images_do_not_pile_up_behind_a_slow_one():
    limits = Limits(batch_size=1, threads=2, pixels=10_000)
    work = Work([(1, 1)] * 500)
    released, begun = threading.Event(), []

    def measure(image):
        begun.append(image)
        return 1, 1

    def finish(image, pixels, result):
        if image.name == "0.png":
            released.wait(10)
        return (image.name,)

    pipeline = Pipeline(images_of(500), Steps(measure, work.read, work.run, finish), limits)
    threading.Timer(0.3, released.set).start()
    with closing(pipeline.outcomes()) as outcomes:
        assert next(outcomes).image.name == "0.png"
        assert len(begun) <= limits.ahead
        assert len(list(outcomes)) == 499


def test_reading_and_writing_go_on_while_the_model_runs():
    """Each step waits for another one of a later or an earlier image: one after the other they would wait for ever."""
    work = Work([(1, 1)] * 6)
    events = {(step, index): threading.Event() for step in ("read", "finish") for index in range(6)}

    def read(image):
        events["read", int(image.path.stem)].set()
        return work.read(image)

    def run(arrays):
        (index,) = (int(one[0, 0, 0]) for one in arrays)
        assert events["read", min(index + 2, 5)].wait(10)
        assert index == 0 or events["finish", index - 1].wait(10)
        return work.run(arrays)

    def finish(image, pixels, result):
        events["finish", int(image.path.stem)].set()
        return work.finish(image, pixels, result)

    with closing(Pipeline(images_of(6), Steps(work.measure, read, run, finish), Limits(1, 2, 100)).outcomes()) as found:
        assert all(outcome.error is None for outcome in found)


@pytest.mark.parametrize("step", ["measure", "read", "run", "finish", "large"])
@pytest.mark.parametrize("error", [StorageError("disk full"), RuntimeError("bug"), MemoryError(), KeyboardInterrupt()])
def test_what_concerns_all_images_ends_it_and_all_threads(step, error):
    work = Work([(1, 1)] * 50)
    steps = {name: getattr(work, name) for name in ("measure", "read", "run", "finish", "large")}
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) > 5:
            raise error
        return steps[step](*arguments)

    before = threading.active_count()
    done = []
    with closing(Pipeline(images_of(50), Steps(**{**steps, step: fail}), Limits(2, 3, 20)).outcomes()) as outcomes:
        with pytest.raises(type(error)) as raised:
            done.extend(outcomes)
        assert raised.value is error
        assert threading.active_count() == before
    assert done == expected_of(work)[: len(done)]
    assert len(done) < 50


def test_giving_up_in_between_stops_the_threads_and_begins_nothing_new():
    work = Work([(1, 1)] * 1000, seed=0)
    before = threading.active_count()
    with closing(Pipeline(images_of(1000), work.steps(), Limits(2, 3, 20)).outcomes()) as outcomes:
        first = next(outcomes)
    assert first.image.name == "0.png"
    assert threading.active_count() == before
    assert sum(map(len, work.batches)) < 500
    done = len(work.batches)
    time.sleep(0.05)
    assert len(work.batches) == done


def test_no_images_at_all():
    assert outcomes_of(Work([]), Limits()) == []


def test_threads_are_as_many_as_allowed():
    work = Work([(1, 1)] * 100, seed=0)
    outcomes_of(work, Limits(2, 3, 50))
    assert len(work.threads) <= 3
    assert not any("MainThread" in name for name in work.threads)
