"""The contest story: run lengths in, snapshots, an ensemble of them, run lengths out; all in one MLflow run."""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import mlflow  # noqa: TID251 (a project on the public API: it opens its run and loads its model as any user does)
import numpy as np
import pandas as pd
import segmentation_models_pytorch as smp
import torch

import smp_ensemble

SUBMISSION = "submission.csv"
ENCODER = "resnet18"


def main(arguments: list[str] | None = None) -> None:
    """Trains, combines, scores and predicts; the run ends as FAILED if anything here raises."""
    options = parse(arguments)
    with mlflow.start_run() as run:  # the one that `mlflow run` opened, or a new one
        data = smp_ensemble.load_data(options.data)
        if data.task.mode != "binary":
            raise SystemExit(f"expected masks of buildings alone in {options.data}, found {data.task.mode} masks")
        images = images_to_predict(options, data)

        snapshots = train(options, data)
        best = smp_ensemble.build_ensemble(snapshots[:1], data=data)  # an ensemble of one: its threshold is tuned alike
        ensemble = smp_ensemble.build_ensemble(snapshots, data=data, selector="all")
        uri = smp_ensemble.log_model(
            ensemble,
            run_id=run.info.run_id,
            registered_model_name=options.register_as or None,
        )

        for split, dataset in {"val": data.val, "test": data.test}.items():
            if dataset is not None:
                for name, model in {"best_snapshot": best, "ensemble": ensemble}.items():
                    score = iou(model, dataset)
                    mlflow.log_metric(f"{split}_iou_{name}", score)
                    print(f"{split} IoU {name}: {score:.4f}")

        submission = predict(mlflow.pyfunc.load_model(uri), images, options.batch_size)
        mlflow.log_text(submission, SUBMISSION)
        if options.output:
            Path(options.output).write_text(submission, encoding="utf-8", newline="")
        print(f"{len(images)} images predicted by {uri}: {options.output or SUBMISSION}, kept in run {run.info.run_id}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; MLproject has the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="train_mask.csv (name,mask as run lengths), beside images/")
    parser.add_argument("--images", default="", help="folder of images to predict (default: those of the test split)")
    parser.add_argument("--epochs", type=int, default=30, help="of the whole training (default: 30)")
    parser.add_argument("--cycles", type=int, default=5, help="and so snapshots and members (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and augmentation (default: 0)")
    parser.add_argument("--crop-size", type=int, default=128, help="of training crops, in pixels (default: 128)")
    parser.add_argument("--batch-size", type=int, default=16, help="images in a batch (default: 16)")
    parser.add_argument("--output", default="", help=f"file for a copy of {SUBMISSION} (default: the run alone has it)")
    parser.add_argument("--register-as", default="", help="name of the registered model (default: not registered)")
    return parser.parse_args(arguments)


def images_to_predict(options: argparse.Namespace, data: smp_ensemble.DataSplits) -> list[tuple[str, Path]]:
    """Name and file of each image."""
    if options.images:
        endings = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
        return [(path.name, path) for path in sorted(Path(options.images).iterdir()) if path.suffix.lower() in endings]
    if data.test is None:
        raise SystemExit(f"{options.data} has no test split: say which images to predict, --images FOLDER")
    return [(record.name + record.image.path.suffix, record.image.path) for record in data.test.records]


def train(options: argparse.Namespace, data: smp_ensemble.DataSplits) -> list[smp_ensemble.Snapshot]:
    """Tracked snapshots of one training, best first."""
    torch.manual_seed(options.seed)
    network = smp.Unet(ENCODER, encoder_weights=None, in_channels=data.task.in_channels, classes=data.task.num_outputs)
    chosen = {"crop_size": options.crop_size, "batch_size": options.batch_size, "seed": options.seed}
    with smp_ensemble.MlflowStore() as store:
        snapshots = smp_ensemble.fit(
            network,
            data.train,
            data.val,
            trainer=smp_ensemble.trainers.SSE(cycles=options.cycles),
            epochs=options.epochs,
            store=store,
            options=smp_ensemble.FitOptions(**chosen),
            params={"arch": "unet", "encoder_name": ENCODER, "epochs": options.epochs, "data": options.data, **chosen},
        )
    return sorted(snapshots, key=lambda snapshot: snapshot.metrics["val_iou"], reverse=True)


def iou(ensemble: smp_ensemble.Ensemble, dataset: torch.utils.data.Dataset) -> float:
    """Intersection over union of buildings, pooled over all pixels of a data set but ignored ones (255)."""
    engine = smp_ensemble.Engine(ensemble)
    intersection = union = 0
    for image, truth in map(dataset.read, range(len(dataset))):
        predicted = (engine.predict([image])[0][0] >= ensemble.threshold) & (truth != 255)
        intersection += np.count_nonzero(predicted & (truth == 1))
        union += np.count_nonzero(predicted | (truth == 1))
    return intersection / union if union else 1.0


def predict(model: mlflow.pyfunc.PyFuncModel, images: list[tuple[str, Path]], batch_size: int) -> str:
    """A CSV with the columns name and mask: run lengths, nothing where there is no building."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("name", "mask"))
    for start in range(0, len(images), batch_size):
        names, paths = zip(*images[start : start + batch_size], strict=True)
        encoded = pd.DataFrame({"image": [path.read_bytes() for path in paths]})
        runs = model.predict(encoded, params={"kind": "rle"})["rle"]
        writer.writerows(zip(names, runs, strict=True))
    return text.getvalue()


if __name__ == "__main__":
    main()
