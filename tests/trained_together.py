"""A program that trains by several methods, in as many processes as it is told to, and writes down what came out."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import OPTIONS

from smp_ensemble.architectures import create_network
from smp_ensemble.data.forms import load_data
from smp_ensemble.testing import MemoryStore
from smp_ensemble.training.fit import FitOptions, fit
from smp_ensemble.training.trainers import EMA, SSE, SWA, Boost, Single

METHODS = {
    "single": Single(),
    "snapshot": SSE(cycles=2),
    "swa": SWA(start=0.5),
    "ema": EMA(decay=0.9),
    "boost": Boost(cycles=2),
}


def trained(method, options, epochs):
    torch.manual_seed(0)
    network = create_network("unet", num_outputs=1, model_options=OPTIONS)
    splits = load_data("synthetic:count=22,size=64,seed=5")
    store = MemoryStore()
    fit(network, splits.train, splits.val, trainer=METHODS[method], epochs=epochs, store=store, options=options)
    return store


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--methods", default="snapshot,swa,ema")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    base = FitOptions(batch_size=4, crop_size=32, precision="32", accelerator="cpu", lr=0.02, clip_norm=5.0)
    options = replace(base, devices=arguments.devices, **arguments.options)
    for method in arguments.methods.split(","):
        store = trained(method, options, arguments.epochs)
        if not store.kept:
            continue  # not the first process
        arguments.out.mkdir(exist_ok=True)
        records = [
            {"step": kept.record.step, "epoch": kept.record.epoch, "metrics": dict(kept.record.metrics)}
            for kept in store.kept
        ]
        (arguments.out / f"{method}.json").write_text(json.dumps({"records": records, "curves": store.history}))
        for index, kept in enumerate(store.kept):
            weights = {name: tensor.contiguous() for name, tensor in kept.weights.items()}
            save_file(weights, arguments.out / f"{method}-{index}.safetensors")


if __name__ == "__main__":
    main()
