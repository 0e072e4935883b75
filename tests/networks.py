"""Small networks for the optimizer's tests."""

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Stem, one residual block, classifier; every kind of tie that a ResNet has."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(inplace=True))
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.relu(out + x).mean((2, 3)))


def residual(seed: int = 0, channels: int = 16) -> Residual:
    """With random weights, and batch norms that have seen images."""
    torch.manual_seed(seed)
    model = Residual(channels)
    with torch.no_grad():
        for norm in (model.bn1, model.bn2):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
        model.train()
        for _ in range(20):
            model(torch.randn(32, 3, 12, 12))
    return model.eval()


def images(count: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
