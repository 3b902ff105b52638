"""Stages against what can be computed by hand, and generation against an exact denoiser."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from src.data.sampler import Batch, LatentBatch, clip_generator, randint_per_clip, randn_per_clip
from src.diffusion import loss_weighting
from src.diffusion.conditioning import FrameMasking
from src.diffusion.long_video import Level, Plan
from src.diffusion.parameterization import Parameterization
from src.diffusion.samplers import ddim
from src.generation import LongVideoGenerator, VideoGenerator
from src.models.attention import AttentionBlock
from src.models.autoencoder import Autoencoder3d, IdentityAutoencoder3d
from src.models.discriminator import PatchDiscriminator
from src.models.unet import UNet3d
from src.stages.autoencoder import AutoencoderStage
from src.stages.diffusion import DiffusionStage
from tests.told import PROCESS, Told


def diffusion_stage(
    unet: nn.Module, loss: str, given_frames_in_loss: bool = False, **masking: object
) -> DiffusionStage:
    values = (
        dict(prediction=0.0, interpolation=0.0, num_given=[], max_noise_level=0, class_dropout=0.0) | masking
    )
    return DiffusionStage(
        unet, autoencoder=IdentityAutoencoder3d(), parameterization=PROCESS, masking=FrameMasking(**values),
        loss=loss, given_frames_in_loss=given_frames_in_loss, loss_weighting=loss_weighting.none,
        has_labels=False,
        generator=lambda _: None, seed=0,
    )  # fmt: skip


def clips(positions: range) -> Batch:
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(64, 3, 4, 6, 6, generator=generator)[positions.start : positions.stop] * 2 - 1
    return Batch(video, torch.full((len(positions),), -1), torch.tensor(list(positions)))


@pytest.mark.parametrize("loss, expected", [("l2", 1.0), ("l1", (2 / torch.pi) ** 0.5)])
def test_predicting_nothing_costs_what_noise_costs(loss: str, expected: float) -> None:
    """E ε² = 1 and E |ε| = √(2/π); 64 clips of 432 numbers give standard errors below 0.01."""
    stage = diffusion_stage(Told(), loss)
    (update,) = stage.updates(stage.modules, clips(range(64)), 0)
    assert update.loss.item() == pytest.approx(expected, abs=0.03)


def test_the_loss_ignores_given_frames_and_shows_them_clean() -> None:
    unet = Told()
    stage = diffusion_stage(unet, "l2", prediction=1.0, num_given=[2])
    batch = clips(range(8))
    (update,) = stage.updates(stage.modules, batch, 0)
    told = unet.told[0]
    assert torch.equal(told["x"][:, :, :2], batch.video[:, :, :2])
    assert told["mask"][:, 0, :, 0, 0].tolist() == [[1, 1, 0, 0]] * 8
    assert told["noise_level"].tolist() == [-1] * 8
    # What remains is exactly the noise of the two free frames: the prediction is zero.
    spread = (told["x"] - PROCESS.coefficients(told["timesteps"], told["x"])[0] * batch.video)[:, :, 2:]
    noise = spread / PROCESS.coefficients(told["timesteps"], told["x"])[1]
    assert update.loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-5)


def test_perturbation_noises_given_frames_to_the_level_that_is_told() -> None:
    unet = Told()
    stage = diffusion_stage(unet, "l2", prediction=1.0, num_given=[1], max_noise_level=250)
    batch = clips(range(64))
    list(stage.updates(stage.modules, batch, 0))
    told = unet.told[0]
    levels = told["noise_level"]
    assert levels.min() >= 0 and levels.max() < 250 and len(set(levels.tolist())) > 40
    signal, spread = PROCESS.coefficients(levels, batch.video)
    noise = ((told["x"] - signal * batch.video) / spread)[:, :, :1]
    assert noise.mean().item() == pytest.approx(0, abs=0.05) and noise.std().item() == pytest.approx(
        1, abs=0.05
    )


def test_without_perturbation_the_loss_is_that_of_a_model_that_never_heard_of_it() -> None:
    """To the last bit, for a real network: mask, clean frames in their places, and nothing told."""
    torch.manual_seed(0)
    unet = UNet3d(
        in_channels=3, out_channels=3, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4,
        attention=partial(AttentionBlock, views=("spatial", "temporal")), num_heads=2, mask_channel=True,
    )  # fmt: skip
    nn.init.normal_(unet.conv_out.weight)
    stage = diffusion_stage(unet, "l2", prediction=0.4, interpolation=0.4, num_given=[1, 2])
    batch = clips(range(16))
    (update,) = stage.updates(stage.modules, batch, 0)

    positions = batch.positions
    noise = randn_per_clip((3, 4, 6, 6), 0, positions, "noise", "cpu")
    timesteps = randint_per_clip(0, 1000, (), 0, positions, "timestep", "cpu")
    masks = [stage.masking.mask(4, clip_generator(0, i, "mask")) for i in positions.tolist()]
    mask = torch.stack(masks)[:, None, :, None, None].expand(-1, 1, -1, 6, 6)
    assert 0 < mask.mean() < 1
    noisy = torch.where(mask > 0, batch.video, PROCESS.add_noise(batch.video, noise, timesteps))
    errors = (unet(noisy, timesteps, mask=mask) - noise).square().mean(1, keepdim=True) * (1 - mask)
    losses = errors.flatten(1).sum(1) / (1 - mask).flatten(1).sum(1)
    assert torch.equal(update.loss, losses.mean())


def test_each_given_frame_may_have_a_level_of_its_own() -> None:
    unet = Told()
    stage = diffusion_stage(
        unet, "l2", True, prediction=0.8, num_given=[2], max_noise_level=250, noise_level_per_frame=True
    )  # fmt: skip
    batch = clips(range(64))
    (update,) = stage.updates(stage.modules, batch, 0)
    (told,) = unet.told
    levels, given = told["frame_noise_level"], told["mask"][:, 0, :, 0, 0] > 0
    assert told["noise_level"] is None and torch.equal(levels >= 0, given) and 0 < given.sum() < 128
    pairs = levels[given].reshape(-1, 2)
    assert levels.max() < 250 and (pairs[:, 0] != pairs[:, 1]).double().mean() > 0.9
    # Uniform on 0 … 249: mean 124.5, deviation 72.2.
    assert pairs.double().mean().item() == pytest.approx(124.5, abs=3 * 72.2 / pairs.numel() ** 0.5)
    noise = torch.empty_like(batch.video)
    for clip in range(64):
        for frame in range(4):
            time = levels[clip, frame] if given[clip, frame] else told["timesteps"][clip]
            alpha = PROCESS.alphas_cumprod[time].float()
            spread = told["x"][clip, :, frame] - alpha.sqrt() * batch.video[clip, :, frame]
            noise[clip, :, frame] = spread / (1 - alpha).sqrt()
    assert noise[:, :, :2].std().item() == pytest.approx(1.0, abs=0.02)
    assert update.loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-4)
    assert stage.evaluate(stage.modules, [batch])["loss"] == pytest.approx(1.0, abs=0.03)
    assert all((call["frame_noise_level"] == -1).all() for call in unet.told[1:])


def test_sampling_tells_the_chosen_level_at_the_given_frames() -> None:
    sampled = Told()
    generator = generator_of(
        sampled, guidance_scale=1.5, max_noise_level=10, noise_level=7, noise_level_per_frame=True
    )
    generator.sample_window([1, 2], None, given=torch.ones(2, 3, 4, 6, 6), mask=leading(1))
    expected = [[7, -1, -1, -1]] * 2 + [[-1] * 4] * 2
    assert all(call["frame_noise_level"].tolist() == expected for call in sampled.told)
    perturbed = sampled.told[0]["x"][:2, :, :1]
    signal, spread = PROCESS.coefficients(torch.tensor([7, 7]), perturbed)
    assert ((perturbed - signal) / spread).std().item() == pytest.approx(1.0, abs=0.15)


def test_given_frames_in_the_loss_are_denoised_from_the_level_that_is_told() -> None:
    unet = Told()
    stage = diffusion_stage(unet, "l2", True, prediction=1.0, num_given=[2], max_noise_level=250)
    batch = clips(range(8))
    (update,) = stage.updates(stage.modules, batch, 0)
    told = unet.told[0]
    signal, spread = PROCESS.coefficients(told["timesteps"], told["x"])
    noise = (told["x"] - signal * batch.video) / spread
    signal, spread = PROCESS.coefficients(told["noise_level"], told["x"])
    noise[:, :, :2] = ((told["x"] - signal * batch.video) / spread)[:, :, :2]
    assert update.loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("masking", [dict(prediction=1.0, num_given=[1]), dict(max_noise_level=250)])
def test_given_frames_in_the_loss_must_be_perturbed(masking: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"max_noise_level=.*conditioning=prediction"):
        diffusion_stage(Told(), "l2", True, **masking)


def test_splitting_a_batch_changes_nothing_but_rounding() -> None:
    unet = Told()
    stage = diffusion_stage(unet, "l2", prediction=0.5, num_given=[1], max_noise_level=10)
    (whole,) = stage.updates(stage.modules, clips(range(8)), 0)
    parts = [next(iter(stage.updates(stage.modules, clips(part), 0))) for part in (range(4), range(4, 8))]
    assert whole.loss.item() == pytest.approx(sum(p.loss.item() for p in parts) / 2, rel=1e-6)


def test_cached_posteriors_and_clips_give_the_same_latents() -> None:
    autoencoder = Autoencoder3d(
        hidden_channels=8, downsample=(2, 2, 2), norm_groups=4, encoder_blocks=1, decoder_blocks=1
    )  # fmt: skip
    autoencoder.latent_mean.fill_(0.3)
    autoencoder.latent_std.fill_(1.7)
    stage = diffusion_stage(Told(), "l2")
    stage.autoencoder = autoencoder.eval()
    batch = clips(range(4))
    with torch.no_grad():
        posterior = autoencoder.encode(batch.video)
    cached = LatentBatch(
        autoencoder.normalize(posterior.mean), posterior.std / 1.7, batch.label, batch.positions
    )
    torch.testing.assert_close(stage.latents(batch), stage.latents(cached), rtol=1e-5, atol=1e-5)


def autoencoder_stage(**changes: float) -> AutoencoderStage:
    torch.manual_seed(0)
    weights = {
        "perceptual_weight": 1.0, "adversarial_weight": 0.5, "max_adaptive_weight": 1e4, "kl_weight": 0.0,
        "r1_weight": 0.0, "lecam_weight": 0.0,
    }  # fmt: skip
    return AutoencoderStage(
        Autoencoder3d(
            hidden_channels=8, downsample=(2, 2, 2), norm_groups=4, encoder_blocks=1, decoder_blocks=1
        ),
        discriminator=PatchDiscriminator(width=8, n_layers=1), perceptual=None, pixel_loss="mse",
        adversarial_loss="hinge", adversarial_start=2, seed=0, **(weights | changes),
        mean_over_processes=lambda values: values,
    )  # fmt: skip


@pytest.mark.parametrize("part", ["perceptual", "adversarial", "max_adaptive", "kl", "r1", "lecam"])
def test_weights_that_cant_be_meant_are_refused(part: str) -> None:
    name = f"{part}_weight"
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"stage\.{name} must be a finite number of at least 0, got"):
            autoencoder_stage(**{name: value})


def big_clips() -> Batch:
    video = torch.rand(4, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(video, torch.full((4,), -1), torch.arange(4))


def test_the_adversary_starts_when_told_and_weighs_by_the_gradients_of_the_step_before() -> None:
    stage = autoencoder_stage()
    batch = big_clips()
    assert [u.name for u in stage.updates(stage.modules, batch, 1)] == ["autoencoder"]
    first = list(stage.updates(stage.modules, batch, 2))
    assert [u.name for u in first] == ["autoencoder", "discriminator"]
    assert first[0].metrics["adaptive_weight"].item() == 0
    second = list(stage.updates(stage.modules, batch, 3))

    # By hand, with the same weights: |gradient of the pixels| / |gradient of the opinion|, last layer.
    autoencoder, discriminator = stage.modules["autoencoder"], stage.modules["discriminator"]
    noise = randn_per_clip(autoencoder.latent_shape(4, 16, 16), 0, batch.positions, "posterior", "cpu")
    reconstruction, _ = autoencoder(batch.video, noise)
    pixel = (reconstruction - batch.video).square().mean()
    opinion = -discriminator(reconstruction).mean()
    norms = [
        torch.autograd.grad(loss, autoencoder.last_layer, retain_graph=True)[0].norm()
        for loss in (pixel, opinion)
    ]
    expected = (norms[0] / (norms[1] + 1e-4)).item()
    assert second[0].metrics["adaptive_weight"].item() == pytest.approx(expected, rel=1e-4)
    assert second[0].loss.item() == pytest.approx((pixel + 0.5 * expected * opinion).item(), rel=1e-4)


class Plane(nn.Module):
    """One logit a clip: a weighted sum of its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 3 * 4 * 16 * 16).reshape(3, 4, 16, 16) / 50)

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum((1, 2, 3, 4))


def test_penalties_of_the_discriminator_have_their_closed_forms() -> None:
    batch = big_clips()

    def losses(**changes: float) -> tuple[list[float], list[dict[str, Tensor]]]:
        stage = autoencoder_stage(**changes)
        stage.discriminator = stage.modules["discriminator"] = Plane()
        updates = [list(stage.updates(stage.modules, batch, step))[1] for step in (2, 3, 4)]
        return [update.loss.item() for update in updates], [update.metrics for update in updates]

    plain, metrics = losses()
    # The gradient of a plane is its weight, everywhere.
    squared = Plane().weight.square().sum().item()
    with_r1, told = losses(r1_weight=10.0)
    assert told[0]["r1"].item() == pytest.approx(0.5 * squared, rel=1e-5)
    assert with_r1[0] - plain[0] == pytest.approx(5 * squared, rel=1e-4)
    # LeCAM pulls towards the logits of the step before, which are the same here, of the other side.
    real, fake = metrics[0]["real"].item(), metrics[0]["fake"].item()
    autoencoder, plane = autoencoder_stage().modules["autoencoder"], Plane()
    noise = randn_per_clip(autoencoder.latent_shape(4, 16, 16), 0, batch.positions, "posterior", "cpu")
    with torch.no_grad():
        logits = plane(batch.video), plane(autoencoder(batch.video, noise)[0])
    expected = ((logits[0] - fake) ** 2).mean() + ((logits[1] - real) ** 2).mean()
    with_lecam, told = losses(lecam_weight=0.5)
    assert told[0]["lecam"].item() == 0.0 and with_lecam[0] == plain[0]
    for i in (1, 2):
        assert told[i]["lecam"].item() == pytest.approx(expected.item(), rel=1e-4)
        assert with_lecam[i] - plain[i] == pytest.approx(0.5 * expected.item(), rel=1e-3, abs=1e-6)


def test_each_part_of_the_loss_tells_the_norm_of_its_gradient() -> None:
    """The norms are those of losses of one part each; frozen averages stay frozen."""
    clips = big_clips()
    stage = autoencoder_stage()
    stage.kl_weight, stage.adversarial_weight = 0.25, 0.5
    stage.discriminator = stage.modules["discriminator"] = Plane()
    stage.running["adaptive_weight"] = torch.tensor(3.0)
    frozen = {name: module.requires_grad_(False) for name, module in stage.modules.items()}
    numbers = stage.evaluate(frozen, [clips])
    autoencoder = stage.autoencoder
    assert not any(p.requires_grad or p.grad is not None for p in autoencoder.parameters())
    autoencoder.requires_grad_(True)
    video = clips.video[:2]
    shape = autoencoder.latent_shape(*video.shape[2:])
    noise = randn_per_clip(shape, 0, clips.positions[:2], "posterior", "cpu")
    for name, part in {
        "pixel": lambda x, posterior: (x - video).square().mean(),
        "kl": lambda x, posterior: 0.25 * posterior.kl().sum() / posterior.mean.numel(),
        "adversarial": lambda x, posterior: -1.5 * Plane()(x).mean(),
    }.items():
        autoencoder.zero_grad()
        part(*autoencoder(video, noise)).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in autoencoder.parameters() if p.grad is not None])
        assert numbers[f"gradient_norm_of/{name}"] == pytest.approx(norm.item(), rel=1e-5)


def test_collapsed_reconstructions_are_warned_of() -> None:
    stage = autoencoder_stage()
    clips = big_clips()
    numbers = stage.evaluate(stage.modules, [clips])
    assert numbers["contrast_ratio"] > 0 and "perceptual" not in numbers
    with torch.no_grad():
        for parameter in stage.autoencoder.decoder.parameters():
            parameter.zero_()
    with pytest.warns(UserWarning, match="nearly of one colour"), pytest.warns(UserWarning, match="frozen"):
        assert stage.evaluate(stage.modules, [clips])["motion_ratio"] == 0.0
    still = Batch(clips.video[:, :, :1].expand_as(clips.video), clips.label, clips.positions)
    assert stage.evaluate(stage.modules, [still])["motion_ratio"] == 1.0


def test_the_weight_of_the_adversary_has_a_limit() -> None:
    batch, weights = big_clips(), []
    for limit in (1e4, 0.01):
        stage = autoencoder_stage(max_adaptive_weight=limit)
        list(stage.updates(stage.modules, batch, 2))
        update, _ = stage.updates(stage.modules, batch, 3)
        weights.append(update.metrics["adaptive_weight"].item())
    assert weights[0] > 0.02
    assert weights[1] == pytest.approx(0.01, rel=1e-6)


def test_the_adversary_is_not_trained_by_the_autoencoders_loss() -> None:
    stage = autoencoder_stage()
    for update in stage.updates(stage.modules, big_clips(), 5):
        for module in stage.modules.values():
            module.zero_grad()
        update.loss.backward()
        touched = {n for n, m in stage.modules.items() if any(p.grad is not None for p in m.parameters())}
        assert touched == {update.name}


def test_latent_statistics_are_those_of_posterior_samples() -> None:
    stage = autoencoder_stage()
    stage.finish(stage.modules, [big_clips()])
    autoencoder = stage.autoencoder
    with torch.no_grad():
        posterior = autoencoder.encode(big_clips().video)
    # Var(sample) = Var(mean) + E[std²], E over positions; 4·2·8·8 samples a channel give about 10 %.
    mean = posterior.mean.transpose(0, 1).flatten(1)
    variance = mean.var(1, correction=0) + posterior.std.square().transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(autoencoder.latent_std.square(), variance, rtol=0.35, atol=0)
    torch.testing.assert_close(autoencoder.latent_mean, mean.mean(1), rtol=0, atol=0.2)


class ExactMean(nn.Module):
    """The exact ε-prediction for latents that all equal 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, timesteps: Tensor, **told: Tensor) -> Tensor:
        signal, spread = PROCESS.coefficients(timesteps, x)
        return (x - 0.5 * signal) / spread


def generator_of(unet: nn.Module, **changes: object) -> VideoGenerator:
    values = dict(
        autoencoder=IdentityAutoencoder3d(), unet=unet, parameterization=PROCESS,
        sampler=partial(ddim, num_sampling_steps=10, eta=1.0), guidance_scale=1.0, window=(3, 4, 6, 6),
        gives_frames=True, has_labels=False, max_noise_level=0, noise_level=0,
    )  # fmt: skip
    return VideoGenerator(**(values | changes))


def leading(count: int) -> torch.Tensor:
    """The mask of a window of four frames whose first are given."""
    return (torch.arange(4) < count).float().reshape(1, 1, -1, 1, 1)


def test_a_seed_is_a_sample_in_any_batch_and_order() -> None:
    generator = generator_of(Told())
    together = generator.sample_window([3, 17, 5], None)
    alone = generator.sample_window([17], None)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=0.1)
    assert not torch.allclose(generator.sample_window([17], None, numbers=[1]), alone, atol=0.1)


def test_given_frames_come_back_and_the_rest_is_generated() -> None:
    given = torch.full((1, 3, 4, 6, 6), -0.25)
    latents = generator_of(ExactMean()).sample_window([0], None, given=given, mask=leading(2))
    assert torch.equal(latents[:, :, :2], given[:, :, :2])
    torch.testing.assert_close(latents[:, :, 2:], torch.full((1, 3, 2, 6, 6), 0.5), rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_frames, num_given", [(4, 1), (5, 1), (30, 2), (31, 3)])
def test_long_videos_have_their_length_and_no_seams(num_frames: int, num_given: int) -> None:
    plan = Plan((Level(1, 4),), num_frames, num_given)
    generator = LongVideoGenerator(plan, [generator_of(ExactMean())], trained_window=4)
    video = torch.cat(list(generator.decode(generator.latents([0, 1], None, batch_size=2))), dim=2)
    assert video.shape == (2, 3, num_frames, 6, 6)
    torch.testing.assert_close(video, torch.full_like(video, 0.5), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("norm", "asked", "expected"),
    [
        ("frame", None, (12, 6, False)),  # three latent frames on either side of six new ones
        ("frame", 9, (9, 6, False)),
        ("frame", 2, (7, 6, False)),
        ("clip", None, (4, 2, True)),
        ("clip", 6, (6, 3, True)),
    ],
)
def test_at_least_half_of_what_is_decoded_is_new(norm: str, asked: int | None, expected: tuple) -> None:
    autoencoder = Autoencoder3d(
        hidden_channels=4, downsample=(4, 4, 4), patch_size=(1, 2, 2), decoder_blocks=1, norm=norm,
        norm_groups=None, channels_per_group=4,
    )  # fmt: skip
    maker = generator_of(ExactMean(), autoencoder=autoencoder, window=(4, 4, 2, 2))
    long = LongVideoGenerator(Plan((Level(1, 4),), 8, 1), [maker], trained_window=4, decoding_window=asked)
    assert long.decoding == expected


def test_what_was_never_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_level=5"):
        generator_of(Told(), noise_level=5)
    with pytest.raises(ValueError, match="conditioning=prediction"):
        generator_of(Told(), gives_frames=False).sample_window([0], None, given=torch.zeros(1, 3, 4, 6, 6))
    with pytest.raises(ValueError, match="latent frames 1 apart, not on frames 4 apart"):
        generator_of(Told()).sample_window([0], None, stride=4)


def test_guidance_that_would_never_work_is_refused() -> None:
    """The sampler calls the network at times 9, 6, 3 and 0 alone."""
    few = partial(ddim, num_sampling_steps=4, eta=0.0)
    process = Parameterization(PROCESS.alphas_cumprod[:10], "epsilon")
    made = partial(generator_of, Told(), sampler=few, parameterization=process, guidance_scale=3.0)
    message = r"guidance.interval=\[4, 5\] holds none .* 4 step.* the nearest are 9, 6, 3, 0\."
    with pytest.raises(ValueError, match=message):
        made(guidance_interval=(4, 5))
    with pytest.raises(ValueError, match=r"filling=\[50, 90\] holds none"):
        made(guidance_interval=(50, 90), keys=("scale", "filling", "level"))
    made(guidance_interval=(6, 6))
    for scale in (-1.0, -0.01, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"guidance\.scale must be a number of at least 0, got"):
            made(guidance_scale=scale)
    made(guidance_scale=0.0)  # the unconditional prediction


@pytest.mark.parametrize(
    ("scale", "interval", "rows"),
    [(1.0, None, [5]), (3.0, None, [10]), (3.0, (6, 9), [5, 10]), (1.0, (6, 9), [5])],
)
def test_the_estimate_doubles_the_rows_of_guided_steps_alone(
    scale: float, interval: tuple[int, int] | None, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = partial(ddim, num_sampling_steps=4, eta=0.0)
    process = Parameterization(PROCESS.alphas_cumprod[:10], "epsilon")
    made = generator_of(
        Told(), sampler=few, parameterization=process, guidance_scale=scale, guidance_interval=interval
    )
    measured = []
    monkeypatch.setattr(
        VideoGenerator, "_measured", lambda _, count, stride: measured.append(count) or float(count)
    )
    assert made.seconds_of_call(5, 1) == pytest.approx(sum(rows) / len(rows))  # two of four steps are guided
    assert sorted(measured) == rows


@pytest.mark.parametrize("level", [0, 7])
def test_unconditional_calls_are_told_what_training_tells(level: int) -> None:
    """With perturbation, training tells a level to clips without given frames, too: so does sampling."""
    masked = dict(prediction=0.5, num_given=[1], max_noise_level=10)
    trained = Told()
    stage = diffusion_stage(trained, "l2", **masked)
    list(stage.updates(stage.modules, clips(range(64)), 0))
    (told,) = trained.told
    unconditional = told["mask"].flatten(1).sum(1) == 0
    assert 0 < unconditional.sum() < 64 and (told["noise_level"][unconditional] >= 0).all()

    sampled = Told()
    generator = generator_of(sampled, guidance_scale=1.5, max_noise_level=10, noise_level=level)
    generator.sample_window([1, 2], None)
    assert all((call["noise_level"] == level).all() and not call["mask"].any() for call in sampled.told)
    sampled.told.clear()
    generator.sample_window([1, 2], None, given=torch.zeros(2, 3, 4, 6, 6), mask=leading(1))
    for call in sampled.told:
        assert (call["noise_level"] == level).all() and len(call["x"]) == 4
        assert call["mask"][:2, :, 0].all() and not call["mask"][2:].any()
