"""Train, sample and measure latent video diffusion models."""

__version__ = "0.1.0"
