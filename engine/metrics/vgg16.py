"""VGG-16 with torchvision's state-dict keys (configuration D of arXiv 1409.1556): precision and recall, and LPIPS."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

FEATURES, INPUT_SIZE = 4096, 224
_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # a max pool after each group


def convolutions() -> nn.Sequential:
    """The 13 convolutions: conv, ReLU, …, pool, with torchvision's numbering (`features.N`)."""
    layers: list[nn.Module] = []
    cin = 3
    for group in _WIDTHS:
        for width in group:
            layers += [nn.Conv2d(cin, width, 3, padding=1), nn.ReLU(inplace=True)]
            cin = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class VGG16(nn.Module):
    """fp32 [N, 3, 224, 224] with ImageNet's statistics → the second hidden layer after its ReLU [N, 4096]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = convolutions()
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, FEATURES), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(FEATURES, FEATURES), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(FEATURES, 1000),
        )  # fmt: skip

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        self.load_state_dict(state, assign=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier[:5](self.features(x).flatten(1))
