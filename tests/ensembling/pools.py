"""Small made-up pools of candidates, and a plain NumPy scorer of their means that shares no code with the package."""

from __future__ import annotations

import numpy as np

from smp_ensemble.ensembling.pool import CandidatePool
from smp_ensemble.ensembling.tally import Block
from smp_ensemble.typing import Snapshot, Task

TASKS = {
    "binary": Task("binary", ("ground", "roof")),
    "multiclass": Task("multiclass", ("land", "roof", "road")),
    "multilabel": Task("multilabel", ("roof", "road", "tree")),
}


def make_codes(mode: str, seed: int, candidates: int, pixels: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Codes `(N, K, V)` of candidates of different skill, and the truth `(V,)`, in multilabel mode `(K, V)`."""
    rng = np.random.default_rng(seed)
    outputs = TASKS[mode].num_outputs
    if mode == "multiclass":
        truth = rng.integers(0, outputs, pixels)
        signal = np.eye(outputs)[truth].T
    else:
        truth = rng.random((outputs, pixels)) < 0.4
        signal = truth.astype(float)
    noise = rng.normal(0, 1, (candidates, outputs, pixels)) * rng.uniform(0.5, 2, (candidates, 1, 1))
    logits = 2 * (signal - 0.5) + noise
    if mode == "multiclass":
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    else:
        probabilities = 1 / (1 + np.exp(-logits))
    codes = np.minimum(np.floor(probabilities * 256), 255).astype(np.uint8)
    return codes, truth[0].astype(int) if mode == "binary" else truth.astype(int)


def make_pool(
    mode: str, codes: np.ndarray, truth: np.ndarray, metric: str = "val_iou", parts: int = 3
) -> CandidatePool:
    """The pool of them, in several blocks, those of each stretch of pixels being a part."""
    task = TASKS[mode]
    divided = []
    for part in np.array_split(np.arange(codes.shape[2]), parts):
        blocks = []
        for output, plane in enumerate(truth if mode == "multilabel" else truth[None]):
            order = part[np.argsort(plane[part], kind="stable")]
            counts = np.bincount(plane[part], minlength=task.num_outputs if mode == "multiclass" else 2).tolist()
            chosen = codes[:, output : output + 1] if mode == "multilabel" else codes
            blocks.append(Block(chosen[:, :, order], counts, output))
        divided.append(blocks)
    names = [Snapshot(f"models:/m-{index}", "", index) for index in range(len(codes))]
    return CandidatePool(names, task, metric, [block for blocks in divided for block in blocks], divided)


def plain_score(mode: str, codes: np.ndarray, truth: np.ndarray, counts: list[int], metric: str) -> float:
    """The metric of a mean, with loops, masks and float64 only."""
    mean = np.tensordot(np.array(counts), codes.astype(np.int64), 1) / sum(counts)
    if metric == "val_nll":
        middle = (np.floor(mean) + 0.5) / 256
        if mode == "multiclass":
            return float(-np.log(middle[truth, np.arange(len(truth))]).mean())
        return float(-np.log(np.where(truth == 1, middle, 1 - middle)).mean())
    if mode == "binary":
        found = [overlap(mean[0] >= code, truth == 1, metric) for code in range(1, 256)]
        return max(0.0 if np.isnan(one) else one for one in found)
    if mode == "multilabel":
        return float(np.nanmean([overlap(mean[k] >= 128, truth[k] == 1, metric) for k in range(len(mean))]))
    decided = mean.argmax(axis=0)
    return float(np.nanmean([overlap(decided == k, truth == k, metric) for k in range(len(mean))]))


def overlap(found: np.ndarray, true: np.ndarray, metric: str) -> float:
    hits, union = (found & true).sum(), (found | true).sum()
    if not union:
        return float("nan")
    return hits / union if metric == "val_iou" else 2 * hits / (found.sum() + true.sum())
