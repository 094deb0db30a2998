"""A train step of the paper's network as it is usually written in PyTorch.

The peer of the workload ``train_step``. Votes are stored, logits are updated in a Python loop,
and all gradients are PyTorch's own. Images are not shifted, which is in its favour.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from capsjax.models import CapsNetConfig


def squash(s: torch.Tensor) -> torch.Tensor:
    """Equation 1 of the paper over the last axis."""
    squared = (s * s).sum(-1, keepdim=True)
    return s * torch.sqrt(squared + 1e-9) / (1 + squared)


class CapsNet(nn.Module):
    """The network of a configuration with dynamic routing and a decoder."""

    def __init__(self, config: CapsNetConfig):
        super().__init__()
        channels = config.image_shape[2]
        self.config = config
        self.conv = nn.Conv2d(
            channels, config.conv_features, config.conv_kernel, config.conv_strides
        )
        self.primary = nn.Conv2d(
            config.conv_features,
            config.primary_types * config.primary_features,
            config.primary_kernel,
            config.primary_strides,
        )
        self.weights = nn.Parameter(
            0.1
            * torch.randn(
                config.num_primary,
                config.num_classes,
                config.class_features,
                config.primary_features,
            )
        )
        widths = (
            config.num_classes * config.class_features,
            *config.decoder_features,
            int(np.prod(config.image_shape)),
        )
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.decoder = nn.Sequential(*layers[:-1], nn.Sigmoid())

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths of the class capsules, and the reconstruction from the true class's."""
        config, batch = self.config, images.shape[0]
        x = self.primary(torch.relu(self.conv(images)))
        x = x.reshape(batch, config.primary_types, config.primary_features, -1)
        poses = squash(x.transpose(2, 3).reshape(batch, -1, config.primary_features))
        votes = torch.einsum("ijdk,bik->bijd", self.weights, poses)
        logits = votes.new_zeros(votes.shape[:3])
        for iteration in range(config.num_iterations):
            coupling = logits.softmax(2)
            v = squash((coupling[..., None] * votes).sum(1))
            if iteration < config.num_iterations - 1:
                logits = logits + (votes * v[:, None]).sum(-1)
        mask = functional.one_hot(labels, config.num_classes)[..., None]
        return (v * v).sum(-1).sqrt(), self.decoder((v * mask).reshape(batch, -1))


def make_step(
    config: CapsNetConfig, images: np.ndarray, labels: np.ndarray, *, compiled: bool, device: str
) -> Callable[[], float]:
    """Makes a step on one batch, which moves the network and returns the loss.

    Args:
      config: of the network; the dtype ``"bfloat16"`` is computed in by ``torch.autocast``.
      images: uint8 ``[B, H, W, C]``.
      labels: ``[B]``.
      compiled: whether by ``torch.compile``.
      device: such as ``"cpu"`` or ``"cuda"``.
    """
    network = CapsNet(config).to(device)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    x = torch.from_numpy(np.moveaxis(images, 3, 1).copy()).to(device)
    y = torch.from_numpy(labels.astype(np.int64)).to(device)

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        pixels = images.float() / 255
        lengths, reconstruction = network(pixels, labels)
        target = functional.one_hot(labels, config.num_classes)
        margin = target * torch.relu(0.9 - lengths) ** 2
        margin = margin + 0.5 * (1 - target) * torch.relu(lengths - 0.1) ** 2
        # The decoder's pixels are in the order of the images' axes C, H, W.
        squares = (reconstruction - pixels.flatten(1)) ** 2
        return (margin.sum(1) + 0.0005 * squares.sum(1)).mean()

    loss_fn = torch.compile(loss_of) if compiled else loss_of

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = loss_fn(x, y)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step
