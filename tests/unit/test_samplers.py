"""Samplers against laws whose exact denoiser is known, against another library, and in their order."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from src.diffusion import noise_schedule, samplers
from src.diffusion.conditioning import Condition
from src.diffusion.guidance import guided
from src.diffusion.samplers import Denoise, Sampler

TABLES = {
    "linear": noise_schedule.linear(1000, 0.0015, 0.0155),
    "cosine": noise_schedule.cosine(1000, 0.008, 0.999),
    "linear_zero_snr": noise_schedule.rescale_to_zero_terminal_snr(
        noise_schedule.linear(1000, 0.0015, 0.0155)
    ),
}

# A mixture of three Gaussians in three dimensions: weights, means, standard deviations.
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[1.5, 0.0, -1.0], [-1.5, 1.0, 0.5], [0.0, -2.0, 1.5]], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def responsibilities(x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """How likely each component is for noisy points `n d` (`n k`), and its mean given the point (`n k d`)."""
    alpha = alpha.reshape(-1, 1)
    variance = alpha * DEVIATIONS**2 + 1 - alpha
    offset = x[:, None] - alpha.sqrt()[..., None] * MEANS
    log = WEIGHTS.log() - 1.5 * variance.log() - 0.5 * offset.square().sum(-1) / variance
    gain = DEVIATIONS**2 * alpha.sqrt() / variance
    return log.softmax(dim=1), MEANS + gain[..., None] * offset


def exact(table: Tensor) -> Denoise:
    """E[x | x_t] of the mixture, for latents `n 3 1 1 1`."""

    def denoise(noisy: Tensor, timesteps: Tensor) -> Tensor:
        share, mean = responsibilities(noisy.flatten(1), table[timesteps])
        return (share[..., None] * mean).sum(1).reshape(noisy.shape)

    return denoise


def mixture(count: int, seed: int) -> Tensor:
    """Independent draws `n 3`."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    normal = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    return MEANS[which] + DEVIATIONS[which, None] * normal


def draws(seed: int, count: int) -> Callable[[int], Tensor]:
    """Noise `n 3 1 1 1` of each step; -1 is the start's."""

    def draw(i: int) -> Tensor:
        generator = torch.Generator().manual_seed(100_000 * (seed + 1) + i + 1)
        return torch.randn(count, 3, 1, 1, 1, dtype=torch.float64, generator=generator)

    return draw


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased estimate of 2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely and Rizzo 2013)."""

    def within(z: Tensor) -> Tensor:
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))


COUNT = 3000


@pytest.fixture(scope="module")
def resolution() -> float:
    """What the distance of two sets of exact draws may come to: five times its standard error."""
    null = [energy_distance(mixture(COUNT, 2 * i), mixture(COUNT, 2 * i + 1)) for i in range(8)]
    return 5 * torch.tensor(null).square().mean().sqrt().item()


@pytest.fixture(scope="module")
def noise_distance() -> float:
    """How far pure noise is from the mixture."""
    return energy_distance(draws(0, COUNT)(-1).flatten(1), mixture(COUNT, 0))


SAMPLERS: dict[str, Sampler] = {
    "ddim": partial(samplers.ddim, num_sampling_steps=200, eta=0.0),
    "ddim, ancestral": partial(samplers.ddim, num_sampling_steps=200, eta=1.0),
    "ddpm": partial(samplers.ddpm, num_sampling_steps=500),
    "dpm_solver": partial(samplers.dpm_solver, num_sampling_steps=30, spacing="log_snr"),
    "dpm_solver, in time": partial(samplers.dpm_solver, num_sampling_steps=100, spacing="time"),
    "dpm_solver_sde": partial(samplers.dpm_solver_sde, num_sampling_steps=60, spacing="log_snr"),
    "heun": partial(samplers.heun, num_sampling_steps=25, rho=7.0),
}


@pytest.mark.parametrize("schedule", TABLES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_mixture_is_reached(name: str, schedule: str, resolution: float, noise_distance: float) -> None:
    """Up to what so many draws can tell, and to 1 % of the way from pure noise."""
    table, seed = TABLES[schedule], list(SAMPLERS).index(name)
    draw = draws(seed, COUNT)
    samples = SAMPLERS[name](exact(table), draw(-1), table, draw).flatten(1)
    distance = energy_distance(samples, mixture(COUNT, 1000 + seed))
    assert distance <= resolution + 0.01 * noise_distance, distance / noise_distance


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_twenty_steps_leave_two_hundredths(schedule: str, seed: int, noise_distance: float) -> None:
    """The default: 20 steps of DPM-Solver++(2M), evenly in log SNR; the truth's own distance taken off."""
    table, count = TABLES[schedule], 5000
    draw = draws(50 + seed, count)
    sampler = partial(samplers.dpm_solver, num_sampling_steps=20, spacing="log_snr")
    samples = sampler(exact(table), draw(-1), table, draw).flatten(1)
    reference = mixture(count, 2000 + seed)
    excess = energy_distance(samples, reference) - energy_distance(mixture(count, 3000 + seed), reference)
    assert excess <= 0.02 * noise_distance


# ---- order ----

FINE = noise_schedule.linear(100_000, 0.0015 / 100, 0.0155 / 100)
# All of these end in the same step from the first time to the clean sample, which is of first order for each
# and cancels in the difference to the reference.
ORDERS: dict[str, tuple[int, Callable[[int], Sampler]]] = {
    "ddim": (1, lambda n: partial(samplers.ddim, num_sampling_steps=n, eta=0.0)),
    "dpm_solver": (2, lambda n: partial(samplers.dpm_solver, num_sampling_steps=n, spacing="log_snr")),
    "heun": (2, lambda n: partial(samplers.heun, num_sampling_steps=n, rho=7.0)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_probability_flow_is_solved_with_its_order(name: str) -> None:
    """Halving the steps' size halves the error of DDIM and quarters that of the second-order methods."""
    order, sampler = ORDERS[name]
    noise = draws(7, 200)(-1)
    denoise = exact(FINE)

    def solve(steps: int, by: Callable[[int], Sampler]) -> Tensor:
        return by(steps)(denoise, noise, FINE, draws(0, 1))

    truth = solve(1500, ORDERS["heun"][1])
    steps = [200, 400, 800] if order == 1 else [25, 50, 100]
    # The median draw: one between two components may go to the other with another step size.
    errors = [(solve(n, sampler) - truth).flatten(1).norm(dim=1).median().item() for n in steps]
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(order - 0.25 < slope < order + 0.6 for slope in slopes), (errors, slopes)


# ---- times ----


def test_timesteps_span_the_schedule() -> None:
    assert samplers.sampling_timesteps(1000, 1000) == list(range(999, -1, -1))
    assert samplers.sampling_timesteps(1000, 3) == [999, 500, 0]
    assert samplers.sampling_timesteps(1000, 1) == [999]
    with pytest.raises(ValueError, match="1000"):
        samplers.sampling_timesteps(1000, 1001)


@pytest.mark.parametrize("schedule", TABLES)
@pytest.mark.parametrize("count", [1, 2, 3, 20, 100, 999, 1000])
def test_times_by_log_snr_are_distinct_and_span_the_schedule(schedule: str, count: int) -> None:
    table = TABLES[schedule]
    for times in (
        samplers.log_snr_timesteps(table, count),
        samplers.rho_timesteps(table, count, 7.0),
    ):
        assert len(times) == count and times[0] == 999 and (count == 1 or times[-1] == 0)
        assert all(later < earlier for earlier, later in itertools.pairwise(times))


def test_times_by_log_snr_are_spaced_so() -> None:
    """Where the table is fine enough, neighbours differ by the same log SNR."""
    times = samplers.log_snr_timesteps(FINE, 20)
    log_snr = samplers.half_log_snr(FINE)[times]
    torch.testing.assert_close(log_snr.diff()[:-4], log_snr.diff()[:-4].mean().expand(15), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", TABLES)
def test_as_many_calls_as_are_said_at_times_of_the_schedule(name: str, schedule: str) -> None:
    sampler, table, seen = SAMPLERS[name], TABLES[schedule], []

    def denoise(noisy: Tensor, timesteps: Tensor) -> Tensor:
        assert timesteps.dtype == torch.int64 and timesteps.shape == (2,)
        seen.append(int(timesteps[0]))
        return 0.5 * noisy

    draw = draws(0, 2)
    result = sampler(denoise, draw(-1), table, draw)
    steps = sampler.keywords["num_sampling_steps"]  # type: ignore[attr-defined]
    twice = 2 * steps - 1 - (schedule == "linear_zero_snr")
    assert len(seen) == (twice if name == "heun" else steps)
    assert seen[0] == 999 and seen[-1] == 0 and result.isfinite().all()


@pytest.mark.parametrize("name", ["dpm_solver", "dpm_solver_sde", "heun", "ddim"])
def test_what_cant_be_is_refused(name: str) -> None:
    sampler = SAMPLERS[name]
    bad = {"dpm_solver": {"spacing": "even"}, "dpm_solver_sde": {"spacing": "even"}, "heun": {"rho": 0.0}}
    with pytest.raises(ValueError, match=r"unknown spacing 'even'|rho must be positive|eta must be between"):
        partial(sampler, **bad.get(name, {"eta": 2.0}))(
            exact(TABLES["linear"]), draws(0, 1)(-1), TABLES["linear"], draws(0, 1)
        )
    with pytest.raises(ValueError, match="from 1 to the schedule's 1000, got 1001"):
        partial(sampler, num_sampling_steps=1001)(
            exact(TABLES["linear"]), draws(0, 1)(-1), TABLES["linear"], draws(0, 1)
        )


def test_ddpm_is_ddim_with_full_variance_and_the_posterior_of_the_paper() -> None:
    """One step by hand: Ho et al. 2020, eqs. 6 and 7."""
    table, draw = TABLES["linear"], draws(5, 16)
    full = samplers.ddim(exact(table), draw(-1), table, draw, num_sampling_steps=20, eta=1.0)
    ancestral = samplers.ddpm(exact(table), draw(-1), table, draw, num_sampling_steps=20)
    torch.testing.assert_close(full, ancestral, rtol=0, atol=1e-12)

    short, noise = table[:2], draw(-1)
    sample = exact(short)(noise, torch.full((16,), 1))
    beta = 1 - short[1] / short[0]
    mean = short[0].sqrt() * beta / (1 - short[1]) * sample
    mean = mean + (1 - beta).sqrt() * (1 - short[0]) / (1 - short[1]) * noise
    latents = mean + ((1 - short[0]) / (1 - short[1]) * beta).sqrt() * draw(0)
    expected = exact(short)(latents, torch.zeros(16, dtype=torch.int64))
    got = samplers.ddpm(exact(short), noise, short, draw, num_sampling_steps=2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


# ---- another library ----


@pytest.fixture(scope="module")
def diffusers() -> object:
    from src.metrics.reconstruction import declare_torchvision_operators

    declare_torchvision_operators()
    import diffusers

    return diffusers


def settings(table: Tensor) -> dict[str, object]:
    """What any of the other library's schedulers is told."""
    before = torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
    return {
        "num_train_timesteps": len(table),
        "trained_betas": (1 - table / before).numpy(),
        "prediction_type": "sample",
    }


def run(scheduler, denoise: Denoise, noise: Tensor, **step) -> Tensor:
    """The other library's loop."""
    latents = noise
    for i, time in enumerate(scheduler.timesteps):
        sample = denoise(latents, torch.full((len(noise),), int(time)))
        told = {key: value(i) if callable(value) else value for key, value in step.items()}
        latents = scheduler.step(sample, time, latents, **told).prev_sample
    return latents


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_agrees_with_another_library(diffusers, eta: float) -> None:
    table = noise_schedule.linear(50, 0.02, 0.1)
    scheduler = diffusers.DDIMScheduler(**settings(table), clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(50)
    draw = draws(3, 8)
    theirs = run(scheduler, exact(table), draw(-1), eta=eta, variance_noise=draw if eta else None)
    ours = samplers.ddim(exact(table), draw(-1), table, draw, num_sampling_steps=50, eta=eta)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)  # their tables are float32


def test_ddpm_agrees_with_another_library(diffusers) -> None:
    table = noise_schedule.linear(200, 0.005, 0.05)
    scheduler = diffusers.DDPMScheduler(**settings(table), clip_sample=False)
    scheduler.set_timesteps(timesteps=samplers.sampling_timesteps(200, 30))
    draw = draws(4, 8)
    generator = torch.Generator().manual_seed(9)
    theirs = run(scheduler, exact(table), draw(-1), generator=generator)
    again = torch.Generator().manual_seed(9)
    ours = samplers.ddpm(
        exact(table),
        draw(-1),
        table,
        lambda _: torch.randn(8, 3, 1, 1, 1, dtype=torch.float64, generator=again),
        num_sampling_steps=30,
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("spacing", ["log_snr", "time"])
def test_dpm_solver_agrees_with_another_library(diffusers, kind: str, spacing: str) -> None:
    table = TABLES["linear"]
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **settings(table), algorithm_type=kind, final_sigmas_type="zero"
    )
    times = (
        samplers.log_snr_timesteps(table, 20)
        if spacing == "log_snr"
        else samplers.sampling_timesteps(1000, 20)
    )
    scheduler.set_timesteps(timesteps=times)
    draw = draws(5, 8)
    stochastic = kind.startswith("sde")
    theirs = run(scheduler, exact(table), draw(-1), variance_noise=draw if stochastic else None)
    sampler = samplers.dpm_solver_sde if stochastic else samplers.dpm_solver
    ours = sampler(exact(table), draw(-1), table, draw, num_sampling_steps=20, spacing=spacing)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # their sigmas are float32


# ---- classes ----


@pytest.mark.parametrize("component", [0, 1, 2])
def test_a_class_is_reached_with_guidance_off(component: int) -> None:
    """With the exact denoiser of each class, scale 1 gives the class's own Gaussian."""
    table, count = TABLES["linear"], 4000

    def denoiser(noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        share, mean = responsibilities(noisy.flatten(1), table[timesteps])
        assert condition.label is not None
        share = torch.where(
            condition.label[:, None] < 0, share, torch.nn.functional.one_hot(condition.label.clamp(0), 3)
        )
        return (share[..., None] * mean).sum(1).reshape(noisy.shape)

    def sampled(scale: float) -> Tensor:
        guide = guided(denoiser, scale)
        condition = Condition(label=torch.full((count,), component))
        sampler = partial(samplers.dpm_solver, num_sampling_steps=30, spacing="log_snr")
        draw = draws(component, count)
        return sampler(lambda x, t: guide(x, t, condition), draw(-1), table, draw).flatten(1)

    samples = sampled(1.0)
    # Besides the draws' own error: the schedule's end isn't quite the pure noise from which sampling starts.
    deviation = DEVIATIONS[component].item()
    error = 4 * deviation / count**0.5 + 2 * table[-1].sqrt().item() * deviation
    torch.testing.assert_close(samples.mean(0), MEANS[component], rtol=0, atol=error)
    expected = DEVIATIONS[component].expand(3)
    torch.testing.assert_close(samples.std(0), expected, rtol=4 / (2 * count) ** 0.5 + 0.02, atol=0)
    # Off, the whole mixture; beyond, the samples keep away from the other classes.
    whole = sampled(0.0)
    assert energy_distance(whole[:2000], mixture(2000, 77)) < 0.02
    away = MEANS[component] - (WEIGHTS[:, None] * MEANS).sum(0)
    assert (sampled(3.0) @ away).mean() > (samples @ away).mean()
