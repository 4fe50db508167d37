"""How to read each part of the page, for people who see such numbers for the first time."""

from __future__ import annotations

SCORES = (
    "IoU is the overlap of what is said and what is there, divided by their union; Dice weighs the overlap twice; "
    "boundary IoU looks at outlines only. ECE is how far confidence and accuracy are apart, classwise ECE the same "
    "for every class; NLL and the Brier score punish confident errors. AURC is the error rate over all shares of "
    "pixels that one may decide; error AUROC is how well uncertainty finds errors (0.5: not at all)."
)

DIFFERENCES = (
    "A difference is measured on the same resampled images for both models, so images that are hard for both "
    "cancel; where its interval holds 0, these data do not tell the two apart. With many members a few intervals "
    "miss by chance."
)

CLASSES = (
    "An interval says where the score would lie for other images of the same kind: images, or groups where there "
    "are groups, are drawn with replacement. Its ends depend on how many there are, so few images give wide ones. A "
    "dash: the class occurs neither in the truth nor in a prediction, and takes no part in the mean."
)

BEST_MEMBER = "The best member is the one with the highest mean IoU on this data, the same in every row."

CALIBRATION = (
    "A pixel's confidence is the probability of its decision. Among all pixels with confidence 0.8, 80 % should be "
    "right: points below the diagonal are over-confident, points above it under-confident. ECE is the mean distance "
    "from the diagonal, weighted by pixels."
)

ENTROPY = "Entropy is 0 where a prediction is certain."

MEMBERS_APART = (
    "Mutual information is the part of it that comes from members contradicting each other, which more data may "
    "cure; the rest is in the images. The variation ratio is the share of members outvoted by the most frequent "
    "decision."
)

CURVES = "In the curves, pixels are decided from the most certain to the least: the lower a curve, the better."

DIVERSITY = (
    "Ambiguity is the mean squared distance of members from their mean: members that agree everywhere gain nothing. "
    "Disagreement is the share of pixels that two members decide differently; error correlation is 0 where two err "
    "independently; a double fault is a pixel that both get wrong, which no weights of the two can mend."
)

EXAMPLES = (
    "Colours are classes, laid over the image. Errors are marked on a pale image; ignored pixels are none. Entropy "
    "has one scale for all rows: where it is bright over an error, the model knew that it was unsure."
)

MULTILABEL = "Where classes may overlap, every pair of a pixel and a class counts as a pixel."
