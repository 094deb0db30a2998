"""A train step of the paper's network as usually written in PyTorch.

It is compared with the workload ``train_step``. Votes are stored, logits are updated in a Python
loop, and all gradients are PyTorch's own. Images are not shifted, which favours PyTorch.

Everything that makes PyTorch fast and changes results only by rounding is enabled: channels last,
TF32, tuned cuDNN convolutions, a fused optimizer. A call ends when the loss of its last step is
read, as a call in JAX ends when its result is ready. Nothing waits for the device before that.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from capsjax.bench.workloads.networks import CAPTURED
from capsjax.models import CapsNetConfig

# Modes of torch.compile; None for no compilation.
_MODES = {
    "torch": None,
    "torch.compile": "default",
    "torch.max-autotune": "max-autotune",
    "torch.compile-graph": "default",
    "torch.graph": "max-autotune-no-cudagraphs",
}


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
        """Returns the lengths of the class capsules, and the reconstruction from the true class.

        Images are ``[B, H, W, C]``, PyTorch's channels last. Capsules and pixels are in the order
        of these axes.
        """
        config, batch = self.config, images.shape[0]
        x = self.primary(torch.relu(self.conv(images.permute(0, 3, 1, 2))))
        poses = squash(x.permute(0, 2, 3, 1).reshape(batch, -1, config.primary_features))
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
    network: CapsNet,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    implementation: str,
    device: str,
    steps: int = 1,
) -> Callable[[], float]:
    """Makes a call that takes steps on one batch, updates the network and returns the last loss.

    Sets process-wide options of PyTorch: TF32, and cuDNN's choice of algorithms by timing.

    Args:
      network: network to train, on any device. If its configuration has dtype ``"bfloat16"``, it is
        computed under ``torch.autocast``.
      images: uint8 ``[B, H, W, C]``.
      labels: ``[B]``.
      implementation: ``"torch"``, which is eager; ``"torch.compile"`` or ``"torch.max-autotune"``,
        which compile the loss and its gradients; or, on ``"cuda"`` only, ``"torch.compile-graph"``
        or ``"torch.graph"``, which capture the compiled step and its optimizer in one CUDA graph,
        the latter after tuning.
      device: name of the device, ``"cpu"`` or ``"cuda"``.
      steps: number of steps of a call.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    config = network.to(device).config
    nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)
    # A captured optimizer counts its steps on the device.
    capturable = implementation in CAPTURED
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True, capturable=capturable)
    x = torch.from_numpy(images.copy()).to(device)
    y = torch.from_numpy(labels.astype(np.int64)).to(device)

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        pixels = images.float() / 255
        lengths, reconstruction = network(pixels, labels)
        target = functional.one_hot(labels, config.num_classes)
        margin = target * torch.relu(0.9 - lengths) ** 2
        margin = margin + 0.5 * (1 - target) * torch.relu(lengths - 0.1) ** 2
        squares = (reconstruction - pixels.flatten(1)) ** 2
        return (margin.sum(1) + 0.0005 * squares.sum(1)).mean()

    mode = _MODES[implementation]
    loss_fn = loss_of if mode is None else torch.compile(loss_of, mode=mode)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = loss_fn(x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = _Captured(step) if implementation in CAPTURED else step

    def call() -> float:
        for _ in range(steps - 1):
            run()
        return float(run())

    return call


class _Captured:
    """A step captured as one CUDA graph.

    The graph holds addresses of tensors; ``step`` keeps the tensors alive.
    """

    def __init__(self, step: Callable[[], torch.Tensor]):
        self.step, self.graph, stream = step, torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compilation, tuning and allocation of the optimizer's state cannot be captured.
            for _ in range(3):
                step()
        # Threads of JAX may call CUDA meanwhile, which by default would break the capture.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.loss = step()

    def __call__(self) -> torch.Tensor:
        self.graph.replay()
        return self.loss
