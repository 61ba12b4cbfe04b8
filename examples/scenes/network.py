"""A shared residual encoder with one decoder a task: segmentation, depth and normals of a 96x96 picture.

Only convolution, batch norm, ReLU, addition, nearest and bilinear x2 resizing, so that any compiler can take it. Each
decoder holds about a fifth of the multiply-adds: the network without two of its tasks is little more than half of it.
"""

from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from .world import CLASSES

ENCODER = (64, 96, 128)
DECODER = (80, 80, 64, 16)
OUTPUTS = {"segmentation": len(CLASSES), "depth": 1, "normals": 3}


class SceneNet(nn.Module):
    """(N, 3, 96, 96) float in [0, 1] -> segmentation logits, depth as ln(metres), normals of any positive length.

    Returns:
        {"segmentation": (N, 10, 96, 96), "depth": (N, 1, 96, 96), "normals": (N, 3, 96, 96)}; axes as in `world`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoders = nn.ModuleDict({name: Decoder(channels) for name, channels in OUTPUTS.items()})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = self.encoder(image)
        return {name: decoder(features) for name, decoder in self.decoders.items()}


class Encoder(nn.Module):
    """Features at strides 2, 4, 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        first, second, last = ENCODER
        self.stem = convolution(3, 32, 3, stride=2)
        self.stage4 = Residual(32, first, stride=2)
        self.stage8 = Residual(first, second, stride=2)
        self.stage16 = nn.Sequential(Residual(second, last, stride=2), Residual(last, last))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        at2 = relu(self.stem(image))
        at4 = self.stage4(at2)
        at8 = self.stage8(at4)
        return at2, at4, at8, self.stage16(at8)


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, 3, stride)
        self.second = convolution(outputs, outputs, 3)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.second(relu(self.first(x))) + self.shortcut(x))


class Decoder(nn.Module):
    """From stride 16 up to stride 2, adding the encoder's features on the way; the answer is resized to full size."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        at16, at8, at4, at2 = DECODER
        first, second, last = ENCODER
        self.from16 = convolution(last, at16, 3)
        self.from8 = Merge(second, at16, at8)
        self.from4 = Merge(first, at8, at4)
        self.from2 = Merge(32, at4, at2)
        self.head = nn.Conv2d(at2, outputs, 1)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        at2, at4, at8, at16 = features
        x = self.from8(at8, relu(self.from16(at16)))
        x = self.from2(at2, self.from4(at4, x))
        return interpolate(self.head(x), scale_factor=2.0, mode="bilinear", align_corners=False)


class Merge(nn.Module):
    """Double the coarse features' size, add the fine ones, and mix the sum."""

    def __init__(self, fine: int, coarse: int, outputs: int) -> None:
        super().__init__()
        self.lateral = convolution(fine, coarse, 1)
        self.mix = convolution(coarse, outputs, 3)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        return relu(self.mix(relu(self.lateral(fine) + interpolate(coarse, scale_factor=2.0, mode="nearest"))))


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (times 1 / stride), and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))
