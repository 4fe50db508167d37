from __future__ import annotations

import numpy as np
import pytest
import torch

from smp_ensemble.data.forms import load_data
from smp_ensemble.data.loading import (
    SeededBatches,
    _collate,
    epochs_loader,
    evaluation_loader,
    ordered_loader,
    training_loader,
)
from smp_ensemble.data.transforms import TrainTransform
from smp_ensemble.exceptions import ConfigError


@pytest.fixture(scope="module")
def dataset():
    return load_data("synthetic:count=20,size=48", mode="multiclass").train  # 14 images


def loader(dataset, epoch_of=lambda: 0, *, workers=0, batch_size=4, seed=0, **options):
    transform = TrainTransform(32, fill=(90, 90, 90))
    return training_loader(
        dataset, transform, batch_size=batch_size, seed=seed, workers=workers, epoch_of=epoch_of, **options
    )


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(one[key], other[key]) for one, other in zip(first, second, strict=True) for key in one
    )


def test_a_batch_holds_raw_tensors(dataset):
    batch = next(iter(loader(dataset)))
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "image": ((4, 3, 32, 32), torch.uint8),
        "mask": ((4, 32, 32), torch.int64),
        "index": ((4,), torch.int64),
    }


def test_the_number_of_workers_and_restarts_change_nothing(dataset):
    epoch = 0
    alone, shared = (loader(dataset, lambda: epoch, workers=workers) for workers in (0, 2))
    epochs = []
    for epoch in range(2):  # noqa: B007 - the loaders ask for it
        epochs.append(list(alone))
        assert same(epochs[-1], list(shared))
    assert not same(*epochs)
    assert same(list(loader(dataset, lambda: 1)), epochs[1])
    assert not same(list(loader(dataset, lambda: 1, seed=1)), epochs[1])


def test_iterating_leaves_the_global_generator_alone(dataset):
    state = torch.random.get_rng_state()
    list(loader(dataset))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(("batch_size", "sizes"), [(4, [4, 4, 4]), (7, [7, 7]), (14, [14]), (15, [14]), (1, [1] * 14)])
def test_an_incomplete_last_batch_is_dropped_unless_alone(dataset, batch_size, sizes):
    batches = loader(dataset, batch_size=batch_size)
    found = [batch["index"].tolist() for batch in batches]
    assert [len(batch) for batch in found] == sizes
    assert len(batches) == len(sizes)
    assert len({index for batch in found for index in batch}) == sum(sizes)


def test_shards_share_an_epoch_without_overlap():
    whole = list(SeededBatches(13, 2, 0, lambda: 0))
    shards = [list(SeededBatches(13, 2, 0, lambda: 0, (rank, 3))) for rank in range(3)]
    assert [len(shard) for shard in shards] == [2, 2, 2]
    assert [batch for step in zip(*shards, strict=True) for batch in step] == whole[:6]


def test_batches_are_a_function_of_seed_epoch_and_place():
    batches = list(SeededBatches(4, 2, 7, lambda: 3))
    generator = np.random.default_rng(np.random.SeedSequence([7, 3]))
    order, seeds = generator.permutation(4), generator.integers(2**32, size=4)
    assert [key for batch in batches for key in batch] == list(zip(order.tolist(), seeds.tolist(), strict=True))


@pytest.mark.parametrize(
    ("stored", "tensor"),
    [(np.uint8, torch.uint8), (np.uint16, torch.int32), (np.int16, torch.int16), (np.float32, torch.float32)],
)
def test_tensors_hold_the_sensor_values(stored, tensor):
    image = np.full((2, 3, 5), 200, dtype=stored)
    batch = _collate([(image, np.zeros((2, 3, 4), np.uint8), 6)])
    assert batch["image"].dtype == tensor
    assert batch["image"].shape == (1, 5, 2, 3)
    assert batch["mask"].shape == (1, 4, 2, 3)
    assert batch["image"].unique().tolist() == [200]


class Uneven:
    """Stands for a data set whose images differ in size."""

    sizes = ((5, 9), (8, 4), (6, 6))

    def __len__(self):
        return len(self.sizes)

    def read(self, index):
        height, width = self.sizes[index]
        image = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
        return image, np.full((height, width), index, np.uint8)


def test_evaluation_pads_to_the_largest_of_a_batch():
    first, second = evaluation_loader(Uneven(), batch_size=2, workers=0, divisor=8)
    assert first["image"].shape == (2, 3, 8, 16)
    assert second["image"].shape == (1, 3, 8, 8)
    image, mask = Uneven().read(0)
    np.testing.assert_array_equal(first["image"][0, :, :5, :9], image.transpose(2, 0, 1))
    np.testing.assert_array_equal(first["image"][0, :, 7, 15], image[4, 8])
    np.testing.assert_array_equal(first["mask"][0, :5, :9], mask)
    assert (first["mask"][0] == 255).sum() == 8 * 16 - 5 * 9
    assert [*first["index"].tolist(), *second["index"].tolist()] == [0, 1, 2]


def test_evaluation_is_the_same_with_workers(dataset):
    loaders = [evaluation_loader(dataset, batch_size=4, workers=workers) for workers in (0, 2)]
    alone, shared = (list(batches) for batches in loaders)
    assert same(alone, shared)
    assert torch.cat([batch["index"] for batch in alone]).tolist() == list(range(14))
    assert alone[0]["image"].shape == (4, 3, 64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size: expected at least 1, found 0"),
        ({"workers": -1}, "workers: expected 0 or more, found -1"),
        ({"seed": -1}, "seed: expected 0 or more, found -1"),
        ({"shard": (2, 2)}, "shard: expected a rank from 0 to below the number of processes, found 2 of 2"),
        ({"shard": (0, 15)}, "at least one training image for each of 15 processes, found 14"),
    ],
)
def test_bad_numbers_are_refused(dataset, options, message):
    with pytest.raises(ConfigError, match=message):
        loader(dataset, **options)
    with pytest.raises(ConfigError, match="divisor: expected at least 1 pixel, found 0"):
        evaluation_loader(dataset, batch_size=1, workers=0, divisor=0)


def test_more_workers_than_processors_are_not_started(dataset):
    assert evaluation_loader(dataset, batch_size=1, workers=10_000).num_workers < 10_000


def test_weights_say_how_often_an_image_is_drawn():
    weights = np.array([1.0, 0.0, 3.0, 6.0])
    epoch = 0
    batches = SeededBatches(4, 2, 0, lambda: epoch, weights_of=lambda: weights)
    drawn = []
    for epoch in range(1500):  # noqa: B007 - the batches ask for it
        drawn += [index for batch in batches for index, _ in batch]
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert shares == pytest.approx([0.1, 0.0, 0.3, 0.6], abs=0.02)  # four standard deviations of 6,000 draws
    assert list(batches) == list(batches)


def test_weights_are_asked_for_at_each_start():
    weights = None
    batches = SeededBatches(6, 2, 0, lambda: 0, weights_of=lambda: weights)
    assert sorted(index for batch in batches for index, _ in batch) == list(range(6))
    weights = np.eye(6)[4]
    assert [index for batch in batches for index, _ in batch] == [4] * 6


def test_epochs_in_a_row_are_those_of_training_and_processes_share_whole_batches(dataset):
    transform = TrainTransform(32, fill=(90, 90, 90))
    expected = [batch for epoch in range(2) for batch in loader(dataset, lambda epoch=epoch: epoch)]
    options = {"batch_size": 4, "seed": 0, "epochs": 2}
    assert same(list(epochs_loader(dataset, transform, **options)), expected)
    parts = [list(epochs_loader(dataset, transform, shard=(rank, 4), **options)) for rank in range(4)]
    assert same([batch for turn in range(2) for part in parts for batch in part[turn : turn + 1]], expected)


def test_ordered_batches_hold_each_image_once(dataset):
    transform = TrainTransform(32, fill=(90, 90, 90), augment="none")
    batches = list(ordered_loader(dataset, transform, batch_size=4, seed=3))
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(14))
    assert [len(batch["image"]) for batch in batches] == [4, 4, 4, 2]
    assert same(batches, list(ordered_loader(dataset, transform, batch_size=4, seed=3)))
    assert not same(batches, list(ordered_loader(dataset, transform, batch_size=4, seed=4)))


@pytest.mark.parametrize("processes", [2, 4])
def test_parts_of_processes_make_up_the_batches_of_one(dataset, processes):
    def batches(size, shard=(0, 1)):
        loader = training_loader(
            dataset, TrainTransform(32, fill=(0, 0, 0)), batch_size=size, seed=3, workers=0, epoch_of=lambda: 1,
            shard=shard,
        )  # fmt: skip
        return list(loader)

    whole = batches(4)
    parts = [batches(4 // processes, (rank, processes)) for rank in range(processes)]
    assert {len(part) for part in parts} == {len(whole)}
    for step, batch in enumerate(whole):
        for name, tensor in batch.items():
            assert torch.equal(torch.cat([part[step][name] for part in parts]), tensor)


def test_processes_evaluate_each_image_once_in_the_batches_of_one(dataset):
    whole = [batch["index"].tolist() for batch in evaluation_loader(dataset, batch_size=3, workers=0)]
    for processes in (2, 3, len(whole) + 1):
        parts = [
            [
                batch["index"].tolist()
                for batch in evaluation_loader(dataset, batch_size=3, workers=0, shard=(rank, processes))
            ]
            for rank in range(processes)
        ]
        assert sorted(indices for part in parts for indices in part) == whole


def test_a_process_without_a_batch_gets_one_that_counts_nothing(dataset):
    (batch,) = evaluation_loader(dataset, batch_size=1000, workers=0, shard=(1, 2), never_empty=True)
    assert batch["index"].tolist() == [-1]
    assert (batch["mask"] == 255).all()
    assert not list(evaluation_loader(dataset, batch_size=1000, workers=0, shard=(1, 2)))
