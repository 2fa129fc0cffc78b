"""A small network for the tests of inserting."""

from __future__ import annotations

import torch
from torch import nn

IMAGE = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class Net(nn.Module):
    """A U-Net of three levels, from plain modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(1, 4), block(4, 6), block(6, 8)
        self.pool = nn.MaxPool2d(2)
        self.up1, self.up0 = Up(8, 6), Up(6, 4)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        b = self.b(self.pool(a))
        return self.last(self.up0(self.up1(self.c(self.pool(b)), b), a))


class Up(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        self.block = block(2 * outputs, outputs)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.block(torch.cat([skip, self.up(x)], 1))


def net() -> Net:
    torch.manual_seed(0)
    return Net()
