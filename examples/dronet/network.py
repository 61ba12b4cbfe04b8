"""PULP-DroNet v2, with the published checkpoint's parameter names.

Source: Lamberti et al., "Tiny-PULP-Dronets", AICAS 2022; the residual network is Loquercio et al., RA-L 2018.
"""

import torch
from torch import Tensor, nn


class DroNetV2(nn.Module):
    """(N, 1, 200, 200) grey float in [0, 1] -> (N, 2): the steering angle and the logit of a collision ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(1, 32, 5, stride=2, padding=2)
        self.pool1 = nn.MaxPool2d(2)
        self.resBlock1 = ResBlock(32, 32)
        self.resBlock2 = ResBlock(32, 64)
        self.resBlock3 = ResBlock(64, 128)
        self.relu = nn.ReLU6()
        self.fc = nn.Linear(7 * 7 * 128, 2)

    def forward(self, frame: Tensor) -> Tensor:
        x = self.pool1(self.layer1(frame))
        x = self.resBlock3(self.resBlock2(self.resBlock1(x)))
        return self.fc(torch.flatten(self.relu(x), 1))


class ResBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 bypass; half the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU6()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU6()
        self.bypass = nn.Conv2d(inputs, outputs, 1, stride=2)
        self.relu3 = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        main = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return main + self.relu3(self.bypass(x))
