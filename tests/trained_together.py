"""A program that trains by several methods, in as many processes as it is told to, and writes down what came out."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import OPTIONS

from smp_ensemble.architectures import create_network
from smp_ensemble.data.forms import load_data
from smp_ensemble.data.transforms import TrainTransform
from smp_ensemble.exceptions import DataError
from smp_ensemble.testing import MemoryStore
from smp_ensemble.training.fit import fit
from smp_ensemble.training.fit_options import FitOptions
from smp_ensemble.training.trainers import EMA, SSE, SWA, Boost, Single

DATA = "synthetic:count=22,size=64,seed=5"
METHODS = {
    "single": Single(),
    "snapshot": SSE(cycles=2),
    "swa": SWA(start=0.5),
    "ema": EMA(decay=0.9),
    "boost": Boost(cycles=2),
}

# What a single rounding grows to within a few steps stays below 1e-5 at this rate.
GENTLE = FitOptions(batch_size=4, crop_size=32, precision="32", accelerator="cpu", lr=0.002, clip_norm=5.0)


def trained(method, options, epochs):
    torch.manual_seed(0)
    network = create_network("unet", num_outputs=1, model_options=OPTIONS)
    splits = load_data(DATA)
    store = MemoryStore()
    fit(network, splits.train, splits.val, trainer=METHODS[method], epochs=epochs, store=store, options=options)
    return store


def break_later():
    """The tenth image that is read is broken: a process reads two for each of four steps in an epoch."""
    whole, calls = TrainTransform.__call__, itertools.count(1)

    def broken(self, *arguments):
        if next(calls) == 10:
            raise DataError("images/010.png: expected a PNG, got 3 bytes")
        return whole(self, *arguments)

    TrainTransform.__call__ = broken


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--break-rank", default="", help="which process fails in its second epoch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    options = replace(GENTLE, devices=arguments.devices, **arguments.options)
    if arguments.break_rank and os.environ.get("LOCAL_RANK") == arguments.break_rank:
        break_later()
    for method in arguments.methods.split(","):
        store = trained(method, options, arguments.epochs)
        if not store.kept:
            continue  # not the first process
        arguments.out.mkdir(exist_ok=True)
        records = [
            {
                "step": kept.record.step,
                "epoch": kept.record.epoch,
                "metrics": dict(kept.record.metrics),
                "batch_norm": kept.record.params.get("batch_norm"),
            }
            for kept in store.kept
        ]
        (arguments.out / f"{method}.json").write_text(json.dumps({"records": records, "curves": store.history}))
        for index, kept in enumerate(store.kept):
            weights = {name: tensor.contiguous() for name, tensor in kept.weights.items()}
            save_file(weights, arguments.out / f"{method}-{index}.safetensors")


if __name__ == "__main__":
    main()
