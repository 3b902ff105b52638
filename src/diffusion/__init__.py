"""The mathematics of diffusion; knows no architecture.

A denoiser is any callable ``(noisy_latents, timesteps, condition) -> prediction``.
"""
