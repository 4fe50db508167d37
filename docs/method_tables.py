"""The tables of `docs/methods.md` and its cards, from the methods' dataclasses and the commands' options.

A table stands between `<!-- generated: NAME -->` and `<!-- end -->`; everything else on these pages is written by hand.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import Field, dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smp_ensemble.cli import COMMANDS, default_text, flag
from smp_ensemble.training.trainers import GROUP
from smp_ensemble.workflows.options import PredictOptions, SoupOptions, TrainOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from smp_ensemble.typing import Trainer

DOCS = Path(__file__).resolve().parent
PLOT_EPOCHS, PLOT_STEPS = 24, 50
"""The training whose schedule the cards show: epochs, and steps of an epoch."""

_BLOCK = re.compile(r"<!-- generated: ([a-z-]+) -->\n.*?<!-- end -->", re.DOTALL)

COSTS = {
    "single": "the budget",
    "snapshot": "the budget",
    "checkpoints": "the budget",
    "fge": "the budget",
    "swa": "the budget, and a pass for batch norm",
    "ema": "the budget, and a pass for batch norm",
    "boost": "the budget, and M(M - 1)/2 passes without gradients",
}
"""What a training costs by trainer, in the order of the table; a pass is one over the training images."""


@dataclass(frozen=True)
class Technique:
    """What is no trainer: a plan, or something that goes with any method.

    Attributes:
        card: Name of its card.
        typed: How one asks for it.
        does: What it does; empty: the help text of its first option.
        cost: In training and prediction.
        reference: Where it comes from.
        options: By dataclass, the options that its card explains.
    """

    card: str
    typed: str
    does: str
    cost: str
    reference: str
    options: Mapping[type[Any], Sequence[str]]


TECHNIQUES = (
    Technique(
        "folds", "--folds K", "", "K trainings", "Krogh and Vedelsby, NIPS 1994",
        {TrainOptions: ("folds", "fold", "split_seed", "seed")},
    ),
    Technique(
        "bootstrap", "--bootstrap N", "", "N trainings", "Breiman, Machine Learning 24, 1996",
        {TrainOptions: ("bootstrap", "fold", "split_seed", "seed")},
    ),
    Technique(
        "seeds", "--seeds N", "", "N trainings", "Lakshminarayanan et al., NeurIPS 2017, arXiv:1612.01474",
        {TrainOptions: ("seeds", "seed")},
    ),
    Technique(
        "lookahead", "--optimizer lookahead_sgd", "slow weights follow the optimizer's, every 6 steps",
        "the budget, and the weights once more in memory", "Zhang et al., NeurIPS 2019, arXiv:1907.08610",
        {TrainOptions: ("optimizer", "lr", "weight_decay")},
    ),
    Technique(
        "soup", "smp-ensemble soup", COMMANDS["soup"].summary,
        "no training; a score, and a pass for batch norm, for each average",
        "Wortsman et al., ICML 2022, arXiv:2203.05482",
        {SoupOptions: ("selector", "metric", "max_members", "batch_norm", "where", "pick")},
    ),
    Technique(
        "mc-dropout", "--passes T", "", "prediction T times", "Gal and Ghahramani, ICML 2016, arXiv:1506.02142",
        {PredictOptions: ("passes",), TrainOptions: ("model_options",)},
    ),
    Technique(
        "tricks", "--class-weights, --warmup-epochs, --clip-norm, --accumulate, --patience, --batch-norm",
        "weights of classes in the loss, warm-up, clipping, accumulation, early stopping, batch norm measured anew",
        "nothing more, but for batch norm: a pass for each snapshot",
        "see the card",
        {TrainOptions: ("class_weights", "warmup_epochs", "clip_norm", "accumulate", "patience", "batch_norm")},
    ),
)  # fmt: skip


def trainers() -> dict[str, type[Trainer]]:
    """Our own training methods by name, in the order of the table; other distributions describe theirs."""
    points = entry_points(group=GROUP)
    found = {point.name: point.load() for point in points if point.dist and point.dist.name == "smp-ensemble"}
    order = [*COSTS, *sorted(found)]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def attributes(kind: type[Any]) -> dict[str, str]:
    """What the section `Attributes:` of a class's docstring says of each, on one line."""
    _, _, section = (inspect.getdoc(kind) or "").partition("\nAttributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break  # the next section
        if match := re.match(r" {4}(\w+): (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif line.strip():
            found[name] += f" {line.strip()}"
    return found


def averaged_epochs(trainer: Trainer, epochs: int, steps_per_epoch: int) -> tuple[float, ...]:
    """Completed epochs, as fractions, after which the weights go into the average; empty without one."""
    averager = trainer.averager()
    if averager is None:
        return ()
    steps = range(1, epochs * steps_per_epoch + 1)
    return tuple(step / steps_per_epoch for step in steps if averager.is_due(step, epochs, steps_per_epoch))


def trainers_table() -> str:
    """A line for each trainer."""
    epochs = next(known.default for known in fields(TrainOptions) if known.name == "epochs")
    rows = []
    for name, kind in trainers().items():
        taken = len(kind().schedule(epochs, PLOT_STEPS).snapshot_steps)
        does = " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())
        card, called = f"[{name}](methods/{name}.md)", f"`trainers.{kind.__name__}`"
        rows.append((card, called, does, str(taken), COSTS[name], kind.reference))
    taken_in = f"snapshots in {epochs} epochs"
    return _table(("name", "class", "what it does", taken_in, "training costs", "reference"), rows)


def techniques_table() -> str:
    """A line for each plan and each technique that goes with any trainer."""
    rows = []
    for one in TECHNIQUES:
        owner, names = next(iter(one.options.items()))
        does = one.does or _option(owner, names[0]).metadata["help"]
        typed = ", ".join(f"`{word}`" for word in one.typed.split(", "))
        rows.append((f"[{one.card}](methods/{one.card}.md)", typed, does, one.cost, one.reference))
    return _table(("name", "typed as", "what it does", "costs", "reference"), rows)


def trainer_options(kind: type[Trainer]) -> str:
    """The fields of a trainer's dataclass."""
    described = attributes(kind)
    rows = [(f"`{known.name}`", str(known.type), f"`{known.default}`", described[known.name]) for known in fields(kind)]
    return _table(("trainer-options", "type", "default", "meaning"), rows)


def command_options(options: Mapping[type[Any], Sequence[str]]) -> str:
    """Options of commands, as `docs/commands.md` has them."""
    known = [_option(owner, name) for owner, names in options.items() for name in names]
    rows = [
        (f"`{flag(one.name)}`", f"`{text}`" if (text := default_text(one)) else "", one.metadata["help"])
        for one in known
    ]
    return _table(("option", "default", "meaning"), rows)


def schedule_text(name: str, kind: type[Trainer]) -> str:
    """The plot of a trainer's schedule, and what it shows in words."""
    trainer = kind()
    ends = [step // PLOT_STEPS for step in trainer.schedule(PLOT_EPOCHS, PLOT_STEPS).snapshot_steps]
    text = f"{PLOT_EPOCHS} epochs with the default options: snapshots after epochs {_listed(ends)}"
    if len(ends) == 1:
        text = f"{PLOT_EPOCHS} epochs with the default options: one snapshot, after epoch {ends[0]}"
    averaged = averaged_epochs(trainer, PLOT_EPOCHS, PLOT_STEPS)
    if len(averaged) == PLOT_EPOCHS * PLOT_STEPS:
        text += "; the weights are averaged after every step"
    elif averaged:
        text += f"; the weights are averaged after epochs {_listed([round(epoch) for epoch in averaged])}"
    return f"![The learning rate of {name}](../images/schedules/{name}.png)\n\n{text}."


def pages() -> dict[Path, str]:
    """Each page with its tables as they are now."""
    tables = {DOCS / "methods.md": {"trainers": trainers_table(), "techniques": techniques_table()}}
    for name, kind in trainers().items():
        tables[DOCS / "methods" / f"{name}.md"] = {
            "schedule": schedule_text(name, kind),
            "hyper-parameters": trainer_options(kind),
            "reference": f"{_linked(kind.reference)}.",
        }
    for one in TECHNIQUES:
        tables[DOCS / "methods" / f"{one.card}.md"] = {"hyper-parameters": command_options(one.options)}
    return {path: fill(path.read_text(encoding="utf-8"), found) for path, found in tables.items()}


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Puts each table between its markers.

    Raises:
        ValueError: A table without a place, or a place without a table.
    """
    places = _BLOCK.findall(text)
    if sorted(places) != sorted(tables):
        raise ValueError(f"expected a place for each of {sorted(tables)}, found {places}: add or remove markers")
    return _BLOCK.sub(lambda match: f"<!-- generated: {match[1]} -->\n\n{tables[match[1]]}\n\n<!-- end -->", text)


def _option(owner: type[Any], name: str) -> Field[Any]:
    return next(known for known in fields(owner) if known.name == name)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *([_linked(cell.replace("|", "\\|")) for cell in row] for row in rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return text.replace("| --- ", "|---").replace("---|", "---|")


def _linked(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
