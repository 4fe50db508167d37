"""torchvision's FCN as an architecture: a ResNet without its classifier, one small head, and upsampling."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.segmentation.fcn import FCNHead

from smp_ensemble.exceptions import ConfigError
from smp_ensemble.registry import nearest

DILATED = {"resnet18": False, "resnet34": False, "resnet50": True, "resnet101": True}
"""Encoders, and whether their last two stages keep the resolution, as torchvision's FCN has it; basic blocks cannot."""

IMAGENET = "IMAGENET1K_V1"
"""What `imagenet` means among torchvision's weights: those that its own FCN starts from."""


class ResNetEncoder(nn.Sequential):
    """torchvision's ResNet up to its last feature map, under torchvision's names of weights.

    Attributes:
        out_channels: Of the feature map.
        output_stride: Pixels of the image for each pixel of the feature map.
    """

    def __init__(self, name: str, weights: str | None, in_channels: int) -> None:
        dilated = DILATED[name]
        resnet = get_model(name, replace_stride_with_dilation=[False, dilated, dilated])
        if weights is not None:
            known = {"imagenet": get_model_weights(name)[IMAGENET], **get_model_weights(name).__members__}
            if weights not in known:
                raise ConfigError(f"unknown encoder_weights '{weights}' for {name}: {nearest(weights, known)}")
            fetched = known[weights].get_state_dict(progress=False, check_hash=True, weights_only=True)
            resnet.load_state_dict(fetched)
        if in_channels != resnet.conv1.in_channels:
            resnet.conv1 = _with_bands(resnet.conv1, in_channels, pretrained=weights is not None)
        super().__init__()
        for part, module in resnet.named_children():
            if part not in {"avgpool", "fc"}:
                self.add_module(part, module)
        self.out_channels: int = resnet.fc.in_features
        self.output_stride = 8 if dilated else 32


class FCN(nn.Module):
    """A fully convolutional network: images `(N, C, H, W)` of any height and width -> logits `(N, K, H, W)`.

    Args:
        encoder: Gives one feature map.
        segmentation_head: Its feature map to logits.
    """

    def __init__(self, encoder: ResNetEncoder, segmentation_head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.segmentation_head = segmentation_head
        self._encoder_is_frozen = False

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, K, H, W)` at the images' size."""
        logits = self.segmentation_head(self.encoder(images))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)

    def train(self, mode: bool = True) -> FCN:
        """Sets training mode; a frozen encoder stays in evaluation mode, as smp's do."""
        super().train(mode)
        if self._encoder_is_frozen:
            self.encoder.eval()
        return self

    def freeze_encoder(self) -> None:
        """Keeps the encoder's weights and batch-norm statistics as they are, whatever `train()` says later."""
        self._encoder_is_frozen = True
        self.encoder.requires_grad_(False).eval()


def build_fcn(
    *,
    encoder_name: str = "resnet50",
    encoder_weights: str | None = None,
    in_channels: int = 3,
    classes: int = 1,
    dropout: float = 0.1,
) -> FCN:
    """Builds torchvision's FCN; what `create_network("fcn", ...)` calls.

    Args:
        encoder_name: `resnet18` and `resnet34` (stride 32), `resnet50` and `resnet101` (dilated, stride 8).
        encoder_weights: `imagenet`, a name of torchvision's (`IMAGENET1K_V2`), or None for random initialisation.
        in_channels: Bands of the images; the first layer's pretrained weights are repeated over them.
        classes: K, output channels.
        dropout: Inside the head, 0 or above and below 1.

    Raises:
        ConfigError: Unknown encoder or weights, or a dropout out of range.
        OSError: The weights cannot be fetched.

    References:
        Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015, arXiv:1411.4038.
    """
    if encoder_name not in DILATED:
        raise ConfigError(f"unknown encoder '{encoder_name}' for fcn: {nearest(encoder_name, DILATED)}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigError(f"expected a dropout in 0..1 (below 1) for fcn, got {dropout!r}: 0.1 is the default")
    encoder = ResNetEncoder(encoder_name, encoder_weights, in_channels)
    head = FCNHead(encoder.out_channels, classes)
    for module in head:
        if isinstance(module, nn.Dropout):
            module.p = float(dropout)
    return FCN(encoder, head)


def _with_bands(first: nn.Conv2d, in_channels: int, *, pretrained: bool) -> nn.Conv2d:
    """The first layer for another number of bands.

    Pretrained weights are summed for one band; for more they are repeated, and scaled as the number of bands, as smp
    does it too.
    """
    layer = nn.Conv2d(in_channels, first.out_channels, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if pretrained:
        old = first.weight.detach()
        bands = old.shape[1]
        repeated = old[:, [index % bands for index in range(in_channels)]] * (bands / in_channels)
        layer.weight = nn.Parameter(old.sum(dim=1, keepdim=True) if in_channels == 1 else repeated)
    return layer
