"""Whole networks: a configuration, a module, and named presets."""

from capsjax.models.baseline import BaselineCNN, BaselineConfig
from capsjax.models.capsnet import CapsNet, CapsNetConfig
from capsjax.models.efficient import EfficientCapsNet, EfficientCapsNetConfig
from capsjax.models.matrix import MatrixCapsNet, MatrixCapsNetConfig
from capsjax.models.network import CapsuleNetwork, Prediction
from capsjax.models.presets import ModelConfig, Network, build, configure, create, presets
from capsjax.models.trained import About, about_pretrained, load_pretrained, pretrained

__all__ = [
    "About",
    "BaselineCNN",
    "BaselineConfig",
    "CapsNet",
    "CapsNetConfig",
    "CapsuleNetwork",
    "EfficientCapsNet",
    "EfficientCapsNetConfig",
    "MatrixCapsNet",
    "MatrixCapsNetConfig",
    "ModelConfig",
    "Network",
    "Prediction",
    "about_pretrained",
    "build",
    "configure",
    "create",
    "load_pretrained",
    "presets",
    "pretrained",
]
