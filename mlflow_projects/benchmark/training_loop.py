"""What hosting a training costs: `smp_ensemble.fit` against a bare PyTorch loop that computes the same.

Same network, data, batches, augmentation, loss, optimizer, rates, number format and validation scores. Both run in
turns in one process, and the median of the ratios is printed: on a shared machine seconds vary more than ratios do.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from importlib.metadata import version

import mlflow  # noqa: TID251 (a project on the public API: it opens its run as any user does)
import segmentation_models_pytorch as smp
import torch

import smp_ensemble
from smp_ensemble.data.loading import evaluation_loader, training_loader
from smp_ensemble.data.normalization import imagenet
from smp_ensemble.data.transforms import TrainTransform
from smp_ensemble.metrics.calibration import CalibrationScores
from smp_ensemble.metrics.confusion import SegmentationScores
from smp_ensemble.precision import autocast_dtype, choose_device, resolve_precision
from smp_ensemble.testing import MemoryStore
from smp_ensemble.training.losses import make_loss
from smp_ensemble.training.optimizers import make_optimizer

LR, WEIGHT_DECAY = 0.05, 1e-4


def make_network(data: smp_ensemble.DataSplits, encoder: str) -> torch.nn.Module:
    """The same weights at every call."""
    torch.manual_seed(0)
    return smp.Unet(encoder, encoder_weights=None, in_channels=data.task.in_channels, classes=data.task.num_outputs)


def hosted(data: smp_ensemble.DataSplits, options: argparse.Namespace) -> tuple[float, dict]:
    """Seconds of `fit`, and the weights that it ends with."""
    store = MemoryStore()
    network = make_network(data, options.encoder)
    begin = time.perf_counter()
    smp_ensemble.fit(
        network, data.train, data.val, trainer="single", epochs=options.epochs, store=store,
        options=smp_ensemble.FitOptions(
            lr=LR, weight_decay=WEIGHT_DECAY, batch_size=options.batch_size, crop_size=options.crop_size,
            precision=options.precision, accelerator=options.accelerator,
        ),
    )  # fmt: skip
    return time.perf_counter() - begin, store.kept[-1].weights


def bare(data: smp_ensemble.DataSplits, options: argparse.Namespace) -> tuple[float, dict]:
    """Seconds of the loop that one would write by hand, and the weights that it ends with."""
    network = make_network(data, options.encoder)
    begin = time.perf_counter()
    device = choose_device(options.accelerator)
    dtype = autocast_dtype(resolve_precision(options.precision, device))
    normalization = imagenet(data.task.in_channels).to(device)
    network = network.to(device).to(memory_format=torch.channels_last)
    loss_of = make_loss("auto", data.task.mode, data.task.num_outputs).to(device)
    optimizer = make_optimizer(network, "sgd", lr=LR, weight_decay=WEIGHT_DECAY)
    epoch = 0
    train_loader = training_loader(
        data.train, TrainTransform(options.crop_size, fill=imagenet(data.task.in_channels).raw_mean()),
        batch_size=options.batch_size, seed=0, workers=0, epoch_of=lambda: epoch,
    )  # fmt: skip
    val_loader = evaluation_loader(data.val, batch_size=options.batch_size, workers=0)
    scores, calibration = SegmentationScores(data.task).to(device), CalibrationScores(data.task).to(device)
    total, step = options.epochs * len(train_loader), 0

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return network(normalization(images.to(device)).to(memory_format=torch.channels_last))

    for epoch in range(options.epochs):  # noqa: B007 (the loader asks for it)
        network.train()
        for batch in train_loader:
            for group in optimizer.param_groups:
                group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.zero_grad()
            loss_of(logits_of(batch["image"]), batch["mask"].to(device)).backward()
            optimizer.step()
            step += 1
        network.eval()
        with torch.inference_mode():
            for batch in val_loader:
                mask = batch["mask"].to(device)
                logits = logits_of(batch["image"]).float()
                loss_of(logits, mask)
                found = logits.softmax(dim=1) if data.task.mode == "multiclass" else logits.sigmoid()
                scores.update(found, mask)
                calibration.update(found, mask)
            scores.compute(), calibration.compute()
            scores.reset(), calibration.reset()
    weights = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    return time.perf_counter() - begin, weights


def main(arguments: list[str] | None = None) -> None:
    """Runs both in turns and prints the median ratio."""
    options = parse(arguments)
    data = smp_ensemble.load_data(options.data)
    with mlflow.start_run():
        ratios = []
        for repeat in range(options.repeats + 1):
            order = (hosted, bare) if repeat % 2 else (bare, hosted)
            seconds, weights = {}, {}
            for run in order:
                seconds[run], weights[run] = run(data, options)
            pairs = [(weights[hosted][name].double(), tensor.double()) for name, tensor in weights[bare].items()]
            difference = max(float((one - other).abs().max()) for one, other in pairs)
            label = "warm-up" if repeat == 0 else f"repeat {repeat}"
            ratio = seconds[hosted] / seconds[bare]
            print(
                f"{label}: fit {seconds[hosted]:.2f} s, bare loop {seconds[bare]:.2f} s, ratio {ratio:.3f}, "
                f"largest difference between their weights {difference:.1e}",
                flush=True,
            )
            if repeat:
                ratios.append(ratio)
                mlflow.log_metric("ratio", ratio, step=repeat)
        median = statistics.median(ratios)
        mlflow.log_metric("median_ratio", median)
        print(
            f"median ratio {median:.3f} over {len(ratios)} repeats ({min(ratios):.3f} to {max(ratios):.3f}); "
            f"{platform.machine()}, {torch.get_num_threads()} threads, device {choose_device(options.accelerator)}, "
            f"precision {resolve_precision(options.precision, choose_device(options.accelerator))}, "
            f"torch {torch.__version__}, lightning {version('lightning')}"
        )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What to train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="synthetic:count=230,size=128", help="as for smp-ensemble train")
    parser.add_argument("--encoder", default="resnet18", help="of a Unet")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--accelerator", default="auto")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
