"""Learning the video autoencoder: pixels, perception, an adversary (LVDM, section 3.2)."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..data.sampler import Batch, LatentBatch, randn_per_clip
from ..metrics.reconstruction import psnr, ssim
from ..metrics.video_statistics import contrast, motion_energy
from ..models.autoencoder import Autoencoder3d, LatentSpace, Posterior
from .stage import Modules, Update

# Below this share of the real clips' contrast or motion, reconstructions count as collapsed.
COLLAPSED = 0.1
# Of the running means of logits, per step (Tseng et al. 2021).
LECAM_DECAY = 0.99


class AutoencoderStage:
    """Reconstruction of clips through a low-dimensional 3D latent space.

    The loss of a clip is the mean pixel error, plus weighted perceptual distance (LPIPS), plus a
    weighted adversarial term, plus the weighted Kullback-Leibler divergence of the posterior (mean over
    latent elements). The adversarial weight is multiplied by the ratio of gradient norms at the
    decoder's last layer (Esser et al. 2021, eq. 7), measured in the previous step over the whole global
    batch, so that splitting a batch over processes or micro-batches changes rounding only.

    Args:
        autoencoder: an ``Autoencoder3d``.
        discriminator: maps frames ``b c t h w`` to patch logits, or None for no adversary.
        perceptual: maps two batches of images ``n c h w`` to distances ``n``, frozen; or None.
        pixel_loss: ``mse`` (the paper) or ``l1`` (the released code).
        perceptual_weight: weight of the perceptual distance.
        adversarial_weight: weight of the adversarial term, before the adaptive factor.
        adversarial_loss: of the discriminator: ``hinge`` (Lim and Ye 2017) or ``vanilla``, the logistic loss
            (Goodfellow et al. 2014); the autoencoder's side is the mean logit with either.
        adversarial_start: step from which the adversary takes part.
        max_adaptive_weight: limit of the ratio of gradient norms. The released code's loss is a sum over the
            c h w of a frame, ours a mean: its limit of 1e4 is 1e4 / (c h w) here.
        kl_weight: weight of the divergence.
        r1_weight: weight of the discriminator's squared gradient at real clips, halved (Mescheder et al.
            2018, eq. 9); 0 for none.
        lecam_weight: weight of LeCAM's pull of the discriminator's logits towards the running mean of those
            of the other side (Tseng et al. 2021, eq. 4); 0 for none.
        seed: of the posterior's samples.
        mean_over_processes: averages a tensor over processes.

    Raises:
        ValueError: for an unknown pixel or adversarial loss, or a weight that is negative or not finite.
    """

    exported = "autoencoder"
    measured: tuple[str, ...]
    higher_is_better = ("psnr", "ssim")

    def __init__(
        self,
        autoencoder: Autoencoder3d,
        *,
        discriminator: nn.Module | None,
        perceptual: nn.Module | None,
        pixel_loss: Literal["mse", "l1"],
        perceptual_weight: float,
        adversarial_weight: float,
        adversarial_loss: Literal["hinge", "vanilla"],
        adversarial_start: int,
        max_adaptive_weight: float,
        kl_weight: float,
        r1_weight: float,
        lecam_weight: float,
        seed: int,
        mean_over_processes: Callable[[Tensor], Tensor],
    ) -> None:
        if pixel_loss not in ("mse", "l1"):
            raise ValueError(f"unknown pixel_loss {pixel_loss!r}; choose mse or l1")
        if adversarial_loss not in ("hinge", "vanilla"):
            raise ValueError(f"unknown adversarial_loss {adversarial_loss!r}; choose hinge or vanilla")
        weights = {
            "perceptual_weight": perceptual_weight,
            "adversarial_weight": adversarial_weight,
            "max_adaptive_weight": max_adaptive_weight,
            "kl_weight": kl_weight,
            "r1_weight": r1_weight,
            "lecam_weight": lecam_weight,
        }
        for name, weight in weights.items():
            if not 0.0 <= weight < math.inf:
                raise ValueError(f"stage.{name} must be a finite number of at least 0, got {weight}")
        self.modules: dict[str, nn.Module] = {"autoencoder": autoencoder}
        self.autoencoder = autoencoder
        self.discriminator = discriminator
        if discriminator is not None:
            self.modules["discriminator"] = discriminator
        self.perceptual = perceptual
        parts = ["pixel", "kl"]
        if perceptual is not None:
            parts.append("perceptual")
        self.measured = ("psnr", "ssim", "contrast_ratio", "motion_ratio", *parts[2:])
        self.measured += tuple(f"gradient_norm_of/{part}" for part in parts)
        self.pixel_error = F.mse_loss if pixel_loss == "mse" else F.l1_loss
        self.perceptual_weight = perceptual_weight
        self.adversarial_weight = adversarial_weight
        self.separate = hinge_loss if adversarial_loss == "hinge" else logistic_loss
        self.adversarial_start = adversarial_start
        self.max_adaptive_weight = max_adaptive_weight
        self.kl_weight = kl_weight
        self.r1_weight = r1_weight
        self.lecam_weight = lecam_weight
        self.seed = seed
        self.mean_over_processes = mean_over_processes
        self._step_of_sums: int | None = None
        self.gradient_norms: dict[str, Tensor] = {}
        self.running: dict[str, Tensor] = {}
        if discriminator is not None:
            last = autoencoder.last_layer
            self.running = {
                "adaptive_weight": torch.zeros(()),
                "reconstruction_gradient": torch.zeros(last.shape),
                "adversarial_gradient": torch.zeros(last.shape),
                "num_micro_batches": torch.zeros(()),
                "logits": torch.zeros(2),  # running means of those of real and of reconstructed clips
                "sum_of_logits": torch.zeros(2),
                "step": torch.full((), -1, dtype=torch.int64),
            }

    def updates(self, modules: Modules, batch: Batch | LatentBatch, step: int) -> Iterator[Update]:
        """The autoencoder's loss and then, computed after its optimizer has stepped, the adversary's."""
        assert isinstance(batch, Batch)
        video = batch.video
        adversarial = self.discriminator is not None and step >= self.adversarial_start
        bare = self.autoencoder
        noise = randn_per_clip(
            bare.latent_shape(*video.shape[2:]), self.seed, batch.positions, "posterior", video.device
        )
        reconstruction, posterior = modules["autoencoder"](video, noise)

        terms = self._terms(video, reconstruction, posterior)
        loss = terms["pixel"]
        if "perceptual" in terms:
            loss = loss + self.perceptual_weight * terms["perceptual"]
        metrics = {name: term.detach() for name, term in terms.items()}
        if adversarial:
            assert self.discriminator is not None
            self.discriminator.requires_grad_(False)
            opinion = -self.discriminator(reconstruction).mean()
            self.discriminator.requires_grad_(True)
            self._begin_step(step, bare.last_layer.device)
            weight = self._adaptive_weight(loss, opinion, bare.last_layer)
            metrics["adversarial"], metrics["adaptive_weight"] = opinion.detach(), weight
            metrics |= {f"gradient_norm_of/{name}": norm for name, norm in self.gradient_norms.items()}
            loss = loss + self.adversarial_weight * weight * opinion
        yield Update("autoencoder", loss + self.kl_weight * terms["kl"], metrics)

        if adversarial:
            pair = torch.cat([video, reconstruction.detach()])
            if self.r1_weight > 0:
                pair.requires_grad_(True)
            real, fake = modules["discriminator"](pair).chunk(2)
            metrics = {"real": real.detach().mean(), "fake": fake.detach().mean()}
            loss = self.separate(real, fake)
            if self.r1_weight > 0:
                (gradient,) = torch.autograd.grad(real.sum(), pair, create_graph=True)
                penalty = 0.5 * gradient.square().sum((1, 2, 3, 4))[: len(video)].mean()
                metrics["r1"] = penalty.detach()
                loss = loss + self.r1_weight * penalty
            if self.lecam_weight > 0:
                of_real, of_fake = self.running["logits"]
                pull = (real - of_fake).square().mean() + (fake - of_real).square().mean()
                pull = pull * self.running["logits"].any()  # the first step has none to be pulled towards
                metrics["lecam"] = pull.detach()
                loss = loss + self.lecam_weight * pull
            self.running["sum_of_logits"] += torch.stack([metrics["real"], metrics["fake"]]).float()
            yield Update("discriminator", loss, metrics)

    def _terms(self, video: Tensor, reconstruction: Tensor, posterior: Posterior) -> dict[str, Tensor]:
        """The parts of the loss that ask no adversary, unweighted means over clips."""
        terms = {"pixel": self.pixel_error(reconstruction, video)}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(
                rearrange(reconstruction, "b c t h w -> (b t) c h w"),
                rearrange(video, "b c t h w -> (b t) c h w"),
            ).mean()
        terms["kl"] = posterior.kl().mean() / posterior.mean[0].numel()
        return terms

    def _begin_step(self, step: int, device: torch.device) -> None:
        """At a new step, makes the last one's sums over micro-batches and processes into running values."""
        running = self.running = {name: value.to(device) for name, value in self.running.items()}
        if self._step_of_sums is None:  # just built, or just resumed
            self._step_of_sums = int(running["step"])
        if self._step_of_sums == step:
            return
        if self._step_of_sums >= 0:
            names = ("reconstruction_gradient", "adversarial_gradient", "sum_of_logits")
            sums = torch.cat([running[name].flatten() for name in names])
            means = self.mean_over_processes(sums) / running["num_micro_batches"]
            first, second, logits = means.split([running[name].numel() for name in names])
            norms = torch.stack([first.norm(), second.norm()])
            weight = (norms[0] / (norms[1] + 1e-4)).clamp_max(self.max_adaptive_weight)
            # The first step's logits are the mean; a step that wasn't finite, and was skipped, leaves all as
            # it was.
            averaged = torch.lerp(logits, running["logits"], LECAM_DECAY * running["logits"].any())
            for name, value in (("adaptive_weight", weight), ("logits", averaged)):
                running[name] = torch.where(value.isfinite(), value, running[name])
            self.gradient_norms = {"reconstruction": norms[0], "adversarial": norms[1]}
        for name in ("reconstruction_gradient", "adversarial_gradient", "sum_of_logits", "num_micro_batches"):
            running[name] = torch.zeros_like(running[name])
        running["step"] = torch.full_like(running["step"], step)
        self._step_of_sums = step

    def _adaptive_weight(self, reconstruction: Tensor, opinion: Tensor, last_layer: Tensor) -> Tensor:
        """The weight from the previous step's gradients; adds this micro-batch's to the running sums."""
        (first,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
        (second,) = torch.autograd.grad(opinion, last_layer, retain_graph=True)
        self.running["reconstruction_gradient"] += first.detach().float()
        self.running["adversarial_gradient"] += second.detach().float()
        self.running["num_micro_batches"] += 1
        return self.running["adaptive_weight"].clone()

    @torch.no_grad()
    def preview(self, modules: Modules, batch: Batch) -> dict[str, Tensor]:
        """Clips above their reconstructions."""
        reconstruction = _reconstruct(_latent_space(modules), batch.video)
        return {"reconstruction": torch.cat([batch.video, reconstruction], dim=3)}

    @torch.no_grad()
    def evaluate(self, modules: Modules, batches: Iterable[Batch]) -> dict[str, float]:
        """Reconstructions of held-out clips: PSNR (dB), SSIM, perceptual distance, contrast and motion.

        The last two are shares of the real clips'; a collapse (grey or frozen clips) is warned of. Of two
        clips also the norm of the gradient of each weighted part of the loss.
        """
        scores: dict[str, list[Tensor]] = {}
        norms: dict[str, float] = {}
        for batch in batches:
            norms = norms or self.gradient_norms_of(modules, batch)
            video, reconstruction = batch.video, _reconstruct(_latent_space(modules), batch.video)
            told = {
                "psnr": psnr(reconstruction, video),
                "ssim": ssim(reconstruction, video),
                "contrast": contrast(reconstruction).mean(1),
                "contrast of real": contrast(video).mean(1),
                "motion": motion_energy(reconstruction).mean(1),
                "motion of real": motion_energy(video).mean(1),
            }
            if self.perceptual is not None:
                # Clip by clip: its activations are many times the size of a clip.
                pairs = zip(reconstruction, video, strict=True)
                told["perceptual"] = torch.stack(
                    [self.perceptual(x.transpose(0, 1), y.transpose(0, 1)).mean() for x, y in pairs]
                )
            for name, values in told.items():
                scores.setdefault(name, []).append(values)
        means = {name: float(torch.cat(values).mean()) for name, values in scores.items()}
        for name, meaning in (("contrast", "of one colour"), ("motion", "frozen")):
            real = means.pop(f"{name} of real", 0.0)
            if name in means:
                means[f"{name}_ratio"] = means.pop(name) / real if real > 0 else 1.0
                if means[f"{name}_ratio"] < COLLAPSED:
                    warnings.warn(
                        f"reconstructions are nearly {meaning}: their {name} is {means[f'{name}_ratio']:.1%} "
                        "of that of the real clips. The adversary may have won: lower "
                        "stage.adversarial_weight, or go back to an earlier state",
                        stacklevel=2,
                    )
        return means | {f"gradient_norm_of/{name}": norm for name, norm in norms.items()}

    def gradient_norms_of(self, modules: Modules, batch: Batch) -> dict[str, float]:
        """How strongly each weighted part of the loss pulls at the autoencoder's weights, on two clips."""
        video, positions = batch.video[:2], batch.positions[:2]
        autoencoder = modules["autoencoder"]
        parameters = list(autoencoder.parameters())
        learning = [parameter.requires_grad for parameter in parameters]
        shape = self.autoencoder.latent_shape(*video.shape[2:])
        noise = randn_per_clip(shape, self.seed, positions, "posterior", video.device)
        weights = {"pixel": 1.0, "perceptual": self.perceptual_weight, "kl": self.kl_weight}
        autoencoder.requires_grad_(True)  # averages have none
        with torch.enable_grad():
            reconstruction, posterior = autoencoder(video, noise)
            terms = self._terms(video, reconstruction, posterior)
            if "discriminator" in modules and self.running["adaptive_weight"] > 0:
                weights["adversarial"] = self.adversarial_weight * float(self.running["adaptive_weight"])
                terms["adversarial"] = -modules["discriminator"](reconstruction).mean()
            norms = {}
            for name, term in terms.items():
                gradient = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
                parts = [part.norm() for part in gradient if part is not None]
                norms[name] = weights[name] * float(torch.stack(parts).norm())
        for parameter, flag in zip(parameters, learning, strict=True):
            parameter.requires_grad_(flag)
        return norms

    @torch.no_grad()
    def finish(self, modules: Modules, batches: Iterable[Batch]) -> None:
        """Measures mean and deviation of latent channels over posterior samples, and stores them."""
        autoencoder = _latent_space(modules)
        total = square = torch.zeros((), dtype=torch.float64)
        count = 0
        for batch in batches:
            posterior = autoencoder.encode(batch.video)
            noise = randn_per_clip(
                posterior.mean.shape[1:], self.seed, batch.positions, "latent statistics", batch.video.device
            )
            sample = rearrange(posterior.sample(noise).double(), "b c t h w -> c (b t h w)")
            total = total + sample.sum(1).cpu()
            square = square + sample.square().sum(1).cpu()
            count += sample.shape[1]
        if count == 0:
            raise ValueError("no training clip to measure the latent statistics on")
        mean = total / count
        autoencoder.latent_mean.copy_(mean)
        autoencoder.latent_std.copy_((square / count - mean.square()).clamp_min(1e-12).sqrt())


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss of logits for real and reconstructed patches (Lim and Ye 2017)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def logistic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's logistic loss, halved as the hinge loss is (Goodfellow et al. 2014)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def _latent_space(modules: Modules) -> LatentSpace:
    autoencoder = modules["autoencoder"]
    assert isinstance(autoencoder, LatentSpace)
    return autoencoder


def _reconstruct(autoencoder: LatentSpace, video: Tensor) -> Tensor:
    """Decoded posterior means, within the range of videos."""
    return autoencoder.decode(autoencoder.encode(video).mean).clamp(-1.0, 1.0)
