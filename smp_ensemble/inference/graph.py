"""A whole ensemble as one graph: what `torch.export` traces, with views batched so that each network is there twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smp_ensemble.architectures import output_stride
from smp_ensemble.ensembling.member import Member
from smp_ensemble.ensembling.views import OWN, check_views, parse_views
from smp_ensemble.exceptions import ConfigError, NetworkError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.export import ExportedProgram

    from smp_ensemble.ensembling.ensemble import Ensemble

SMALLEST = 2
"""Height and width are at least so many strides: at one, a network's deepest map is one pixel, which torch.export takes
for a dimension that is always 1."""


class EnsembleGraph(nn.Module):
    """Raw images `(N, C, H, W)`, float32 -> probabilities `(N, K, H, W)`; H and W are multiples of the stride.

    The same numbers as `Engine` at `precision="32"`: normalisation, members, views, combiner and temperature. Views
    that keep height and width are one batch, those that swap them another, so each network is in the graph at most
    twice, however many views there are. Nothing pads or crops.

    Args:
        ensemble: Is moved to the CPU, in evaluation mode.
        views: In place of the ensemble's own; None or `own`: those.

    Attributes:
        views: Their canonical parts, as in `ensemble.json`.
        stride: What H and W must be multiples of.
        in_channels: Bands that images must have.

    Raises:
        ConfigError: Unknown views or views with scales; members that do not say how many bands they take.

    Example:
        >>> from smp_ensemble.data.normalization import imagenet
        >>> from smp_ensemble.ensembling.ensemble import Ensemble
        >>> member = Member(nn.Conv2d(3, 2, 3, padding=1), imagenet())
        >>> graph = EnsembleGraph(Ensemble([member], mode="multiclass"), "d4")
        >>> graph(torch.zeros(2, 3, 64, 96)).shape
        torch.Size([2, 2, 64, 96])
    """

    def __init__(self, ensemble: Ensemble, views: str | Sequence[str] | None = None) -> None:
        super().__init__()
        self.views = ensemble.views if views is None or views == OWN else check_views(views)
        shapes = parse_views(self.views)
        if any(view.scale != 1 for view in shapes):
            raise ConfigError(
                f"views '{'+'.join(self.views)}' cannot be exported: the size of a scaled image is rounded, which a "
                "graph for any height and width cannot do exactly; choose --views none, flips or d4"
            )
        self._groups = [
            group for turned in (0, 1) if (group := tuple(view for view in shapes if view.turns % 2 == turned))
        ]
        self._count = len(shapes)
        # An engine may have left the weights channels-last, which torch.export.save warns of.
        self.ensemble = ensemble.to("cpu").to(memory_format=torch.contiguous_format).eval()
        self.stride = output_stride(_network_of(member) for member in ensemble.members)
        self.in_channels = _bands(ensemble)

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities `(N, K, H, W)`, float32, of raw images `(N, C, H, W)`."""
        return self.ensemble.combine(self._member_probabilities(images))

    def _member_probabilities(self, images: Tensor) -> Iterator[Tensor]:
        size = (images.shape[-2], images.shape[-1])
        batches = [torch.cat([view.forward(images) for view in group]) for group in self._groups]
        for member in self.ensemble.members:
            total: Tensor | None = None
            for group, batch in zip(self._groups, batches, strict=True):
                found = torch.unflatten(self.ensemble.probabilities_of(member, batch), 0, (len(group), -1))
                for index, view in enumerate(group):
                    back = view.inverse(found[index], size)
                    total = back if total is None else total + back
            assert total is not None  # there is a view
            yield total / self._count


def trace(graph: EnsembleGraph) -> ExportedProgram:
    """The graph for any number of images and any multiples of the stride from `SMALLEST` strides on.

    What it holds of this machine (the source files that each operation came from, example images) is left out.

    Raises:
        NetworkError: torch.export cannot trace a member or a combiner.
    """
    height, width = (
        graph.stride * torch.export.Dim("height", min=SMALLEST),
        graph.stride * torch.export.Dim("width", min=SMALLEST),
    )
    images = torch.zeros(2, graph.in_channels, 4 * graph.stride, 6 * graph.stride)
    shapes = {"images": {0: torch.export.Dim("batch"), 2: height, 3: width}}
    try:
        with torch.no_grad():
            program = torch.export.export(graph, (images,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch has no one class for what tracing may raise
        reason = " ".join(str(error).split())[:300]
        raise NetworkError(
            f"torch.export cannot trace this ensemble, {type(error).__name__}: {reason}; an architecture or a combiner "
            "branches on the values of its input?"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    program.example_inputs = None
    return program


def _network_of(member: nn.Module) -> nn.Module:
    return member.network if isinstance(member, Member) else member


def _bands(ensemble: Ensemble) -> int:
    bands = {member.normalization.in_channels for member in ensemble.members if isinstance(member, Member)}
    if len(bands) != 1:
        raise ConfigError(
            f"expected members that take the same number of bands, got {sorted(bands) or 'none that says how many'}: "
            "wrap networks as Member(network, normalization)"
        )
    return bands.pop()
