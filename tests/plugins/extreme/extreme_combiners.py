"""Two combiners that smp_ensemble does not know: one that only streams, and one that is fitted."""

from __future__ import annotations

import torch


class Max:
    """The largest probability that any member gives a class, normalised over classes where they compete."""

    def __init__(self, context):
        self.mode = context.mode
        self.largest = None

    def update(self, probabilities, weight=1.0):
        self.largest = probabilities.clone() if self.largest is None else torch.maximum(self.largest, probabilities)

    def compute(self):
        return self.largest / self.largest.sum(dim=1, keepdim=True) if self.mode == "multiclass" else self.largest


class Best:
    """The member with the least log-loss on validation data, alone."""

    def __init__(self, context):
        if "member" not in context.state:
            raise ValueError("the combiner 'best' needs to be fitted")
        self.member = int(context.state["member"])
        self.count = 0
        self.chosen = None

    def update(self, probabilities, weight=1.0):
        if self.count == self.member:
            self.chosen = probabilities.clone()
        self.count += 1

    def compute(self):
        return self.chosen

    @staticmethod
    def fit(sample):
        losses = []
        for probabilities in sample.probabilities.unbind(dim=1):
            if sample.mode == "multiclass":
                of_truth = probabilities.gather(1, sample.truth[:, None])
            else:
                truth = sample.truth.reshape(probabilities.shape)
                of_truth = torch.where(truth == 1, probabilities, 1 - probabilities)[truth != 255]
            losses.append(-of_truth.clamp_min(1e-7).log().mean())
        return {"member": torch.stack(losses).argmin()}
