"""How each output of each golden case is computed with this project's code.

A case's JSON and the names of its tensors say everything: sizes, steps, which branches. A function here takes
a case and gives what computes an output by name; it raises `Unknown` for a name that it has no rule for.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from src.diffusion.conditioning import Condition, GivenFrames, denoiser_of
from src.diffusion.objective import denoising_loss
from src.diffusion.parameterization import Parameterization
from src.interop import official, official_sampling
from src.interop.official import (
    OfficialLatentDiffusion,
    autoencoder_from_official,
    discriminator_from_official,
    latent_diffusion_from_official,
    schedule_arguments,
    schedule_tables,
    to_official,
    unet_from_official,
)
from src.interop.official_names import unet_blocks
from src.interop.official_sampling import (
    Given,
    OfficialSampler,
    decode,
    extend_by_autoregression,
    fill_gaps,
    given_frames,
    guidance_scale_of,
    last,
    to_frames,
)
from src.metrics.features import resize_frames
from src.metrics.frechet import Arithmetic, GaussianStatistics, frechet_distance
from src.metrics.i3d import I3d
from src.metrics.i3d_weights import from_pytorch_i3d
from src.metrics.kernel import kernel_distance
from src.metrics.reconstruction import perceptual_distance
from src.models.embeddings import sinusoidal_embedding
from src.stages.autoencoder import AutoencoderStage
from src.training.ema import Ema
from tests.parity.conftest import Case, Compute, Unknown, recipe_stream

# ---- networks ----


def autoencoder(case: Case) -> Compute:
    network = autoencoder_from_official(case.state, case.config)
    video, noise = case.inputs["x"], case.inputs["noise"]
    posterior = network.encode(video)
    features = network.encoder(video)
    sample = posterior.sample(noise)
    normal = Normal(posterior.mean, posterior.std)
    weights = [tensor.double() for tensor in case.state.values()]
    computed: dict[str, Callable[[], Tensor]] = {
        "encoder_h": lambda: features,
        "moments": lambda: network.to_moments(features),
        "mean": lambda: posterior.mean,
        "logvar": lambda: posterior.logvar,
        "std": lambda: posterior.std,
        "z_sample": lambda: sample,
        "kl_per_sample": posterior.kl,
        # The original sums its divergence and likelihood over three of the four axes.
        "kl_raw": lambda: torch.distributions.kl_divergence(normal, Normal(0.0, 1.0)).sum((1, 2, 3)),
        "nll_raw": lambda: -normal.log_prob(sample).sum((1, 2, 3)),
        "rec_mode": lambda: network.decode(posterior.mean),
        "rec_sample": lambda: network(video, noise)[0],
        "state_checksum": lambda: torch.stack(
            [
                torch.stack([w.sum() for w in weights]).sum(),
                torch.stack([w.abs().sum() for w in weights]).sum(),
            ]
        ),
    }
    return chosen_from(computed)


def discriminator(case: Case) -> Compute:
    network = discriminator_from_official(case.state, case.config)
    frames = case.inputs["frames"]
    computed = {"logits_eval": network.eval()(frames), "logits_train": network.train()(frames)}
    computed |= {f"after_train.{key}": tensor for key, tensor in to_official(network).items()}
    return chosen_from({name: lambda tensor=tensor: tensor for name, tensor in computed.items()})


def autoencoder_loss(case: Case) -> Compute:
    """The released objective is ours times the elements of a frame: it sums over a frame, ours averages.

    Its adaptive weight is this step's, ours the previous one's: the stage is shown the same batch twice.
    """
    config, video = case.config, case.inputs["x"]
    assert not config.get("perceptual_weight"), "the perceptual distance has a case of its own"
    network = autoencoder_from_official(
        {k: v for k, v in case.state.items() if not k.startswith("loss.")}, config
    )
    per_frame = video[0, :, 0].numel() * math.exp(-config.get("logvar", 0.0))
    offset = video[0, :, 0].numel() * config.get("logvar", 0.0)
    kl_share = per_frame / case.inputs["noise"][0].numel()
    discriminator = discriminator_from_official(case.state, config, prefix="loss.discriminator.").eval()
    factor = config.get("disc_factor", 1.0)
    noise = case.inputs["noise"]

    def stage(loss: str) -> AutoencoderStage:
        return AutoencoderStage(
            network.requires_grad_(True),
            discriminator=discriminator,
            perceptual=None,
            pixel_loss="l1",
            perceptual_weight=0.0,
            adversarial_weight=config["disc_weight"] * factor,
            adversarial_loss=loss,  # type: ignore[arg-type]
            adversarial_start=0,
            max_adaptive_weight=1e4 / per_frame,
            kl_weight=config["kl_weight"] / kl_share,
            r1_weight=0.0,
            lecam_weight=0.0,
            seed=0,
            mean_over_processes=lambda values: values,
        )

    @cache
    def updates(loss: str) -> dict[str, Any]:
        made, batch = stage(loss), None
        from src.data.sampler import Batch
        from src.stages import autoencoder as module

        batch = Batch(video, torch.full((len(video),), -1), torch.arange(len(video)))
        drawn = module.randn_per_clip
        module.randn_per_clip = lambda *_: noise  # type: ignore[assignment]
        try:
            list(made.updates(made.modules, batch, 0))
            generator, adversary = made.updates(made.modules, batch, 1)
        finally:
            module.randn_per_clip = drawn
        network.zero_grad()
        generator.loss.backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        return {"generator": generator, "discriminator": adversary, "gradients": gradients}

    def compute(name: str) -> Tensor:
        if name == "reconstruction":
            return network(video, noise)[0]
        parts = re.fullmatch(r"(gen|disc)(?:\.(vanilla|hinge))?\.step(\d+)\.(\w+)", name)
        if not parts:
            raise Unknown(name)
        side, kind, step, what = parts.groups()
        made = updates(kind or config.get("disc_loss", "hinge"))
        started = float(int(step) >= config["disc_start"])
        if side == "disc":
            adversary = made["discriminator"]
            return {
                "loss": started * factor * adversary.loss,
                "logits_real": adversary.metrics["real"],
                "logits_fake": adversary.metrics["fake"],
            }[what]
        told = made["generator"].metrics
        kl = told["kl"] * case.inputs["noise"][0].numel()
        adversarial = config["disc_weight"] * factor * told["adaptive_weight"] * told["adversarial"]
        nll = per_frame * told["pixel"] + offset
        if what.startswith("grad_"):
            assert started, "gradients are of the whole loss"
            (ours,) = [
                name
                for name, weight in network.named_parameters()
                if weight.ndim == 5 and official_name(name) == what.removeprefix("grad_")
            ]
            return per_frame * made["gradients"][ours]
        return {
            "loss": nll + config["kl_weight"] * kl + started * per_frame * adversarial,
            "kl_loss": kl,
            "nll_loss": nll,
            "rec_loss": told["pixel"],
            "d_weight": config["disc_weight"] * per_frame * told["adaptive_weight"],
            "disc_factor": torch.tensor(started * factor),
            "g_loss": told["adversarial"],
        }[what]

    def official_name(ours: str) -> str:
        key = official.autoencoder_names(network)[ours].key
        return key.removesuffix(".weight").removesuffix(".conv").replace(".", "_")

    return compute


def unet(case: Case) -> Compute:
    network = unet_from_official(case.state, case.config)
    given = case.inputs
    blocks = {theirs: network.get_submodule(ours) for ours, theirs in unet_blocks(network)}

    def block(kind: str) -> Any:
        found = re.search(rf"{kind} block '([\w.]+)'", case.notes)
        assert found, f"the notes don't name the {kind} block"
        return blocks[found[1]]

    def call(x: str = "x", t: str = "t", **told: Tensor) -> Tensor:
        if not network.mask_channel:
            return network(given[x], given[t], **told)
        return network(given[x][:, :-1], given[t], mask=given[x][:, -1:], **told)

    def level_by_frame() -> Tensor:
        marked = given["mask"][:, 0, :, 0, 0] > 0
        return torch.where(marked, given["s"][:, None], -1)

    return chosen_from(
        {
            "y": call,
            "y_other_T": lambda: call("x_other_T", "t_other_T"),
            "y_class": lambda: call(label=given["class"]),
            "y_label": lambda: call(noise_level=given["y"]),
            "y_nolabel": call,
            "y_perframe": lambda: call(frame_noise_level=level_by_frame()),
            "attn_y": lambda: block("attention")(given["attn_x"]),
            "res_y": lambda: block("residual")(given["res_x"], F.silu(given["res_emb"])[:, None]),
        }
    )


# ---- schedules ----


def schedule(case: Case) -> Compute:
    def tables(name: str) -> dict[str, Tensor]:
        function, arguments = schedule_arguments(case.config[name])
        signal = getattr(official.noise_schedule, function)(**arguments)
        return schedule_tables(signal) | {"lvlb_weights": likelihood_weights(signal)}

    def steps(number: str, spacing: str = "uniform") -> list[int]:
        return official_sampling.ddim_timesteps(len(signal), int(number), spacing)  # type: ignore[arg-type]

    main = next(iter(case.config)) if "lvdm" not in case.config else "lvdm"
    function, arguments = schedule_arguments(case.config[main])
    signal = getattr(official.noise_schedule, function)(**arguments).float()  # as a checkpoint stores it

    def compute(name: str) -> Tensor:
        if found := re.fullmatch(r"timestep_embedding\.(\d+)", name):
            return sinusoidal_embedding(case.inputs["emb_t"], int(found[1]))
        if found := re.fullmatch(r"ddim\.timesteps\.(\w+)\.(\d+)", name):
            return torch.tensor(steps(found[2], found[1]))
        if found := re.fullmatch(r"ddim\.(\d+)\.(alphas|alphas_prev)", name):
            alphas, before, _ = official_sampling.ddim_tables(signal, steps(found[1]), 0.0)
            return alphas if found[2] == "alphas" else before
        if found := re.fullmatch(r"ddim\.(\d+)\.eta([\d.]+)\.sigmas", name):
            return official_sampling.ddim_tables(signal, steps(found[1]), float(found[2]))[2]
        if found := re.fullmatch(r"(\w+)\.(\w+)", name):
            return tables(found[1])[found[2]]
        raise Unknown(name)

    return compute


def likelihood_weights(alphas_cumprod: Tensor, predicts: str = "epsilon") -> Tensor:
    """Weights that make the simple loss a bound of the likelihood, as the released code logs it."""
    # From float32 tables, as there: early and late in the schedule their rounding shows.
    tables = schedule_tables(alphas_cumprod)
    alphas = (alphas_cumprod / tables["alphas_cumprod_prev"].double()).float()
    signal = tables["alphas_cumprod"]
    if predicts == "epsilon":
        weights = tables["betas"] ** 2 / (2 * tables["posterior_variance"] * alphas * (1 - signal))
    else:
        weights = 0.5 * signal.sqrt() / (2.0 - signal)
    return torch.cat([weights[1:2], weights[1:]])


# ---- latent diffusion ----


def latent_diffusion(case: Case) -> Compute:
    """Whole checkpoints: the unconditional model, prediction and interpolation."""
    config, given, known = case.config, case.inputs, case.outputs
    raw = latent_diffusion_from_official(case.whole_state, config, use_ema=False)
    averaged = latent_diffusion_from_official(case.whole_state, config)
    process = raw.parameterization
    tables = schedule_tables(process.alphas_cumprod)
    sampling = config.get("sampling", {})
    told_steps = re.search(r"S=(\d+)", case.notes)
    num_steps = sampling["S"] if "S" in sampling else int(told_steps[1]) if told_steps else 0
    # The released scripts sample as many frames as their noise has, whatever a training clip had.
    num_frames = given["x_T"].shape[2]

    def of_time(values: Tensor, like: Tensor) -> Tensor:
        return values[given["t"]].reshape(-1, *[1] * (like.ndim - 1))

    # -- training --

    def noises(which: str) -> tuple[Tensor, Tensor]:
        if which == "two_noises":
            return given["two_noises.randn_like.00"], given["two_noises.randn_like.01"]
        noise = given["noise_t"] if "noise_t" in given else given["noise"]
        return noise, noise

    def given_in_training(noise: Tensor) -> Condition:
        if not raw.unet.mask_channel:
            return Condition()
        perturbed = process.add_noise(given["z"], noise, given["s"])
        return Condition(GivenFrames(perturbed, given["mask"], given["s"]))

    def loss(which: str, kind: str, what: str, predicts: Any = raw.prediction_type) -> Tensor:
        noise, given_noise = noises(which)

        def mean(weights: Tensor | None) -> Tensor:
            return denoising_loss(
                denoiser_of(raw.unet),
                Parameterization(process.alphas_cumprod, predicts),
                given["z"] if "z" in given else known["z"],
                noise,
                given["t"],
                given_in_training(given_noise),
                error=torch.abs if kind == "l1" else torch.square,
                weights=weights,
                given_noise=given_noise if raw.unet.mask_channel else None,
            ).mean()

        def simple() -> Tensor:
            return mean(None)

        def bound() -> Tensor:
            return mean(likelihood_weights(process.alphas_cumprod, predicts))

        # The shipped configs leave these three as they are.
        logvar = config["params"].get("logvar_init", 0.0)
        simple_share = config["params"].get("l_simple_weight", 1.0)
        bound_share = config["params"].get("original_elbo_weight", 0.0)

        def whole() -> Tensor:
            total = simple_share * (simple() / math.exp(logvar) + logvar)
            return total + bound_share * bound() if bound_share else total

        return {"loss": whole, "loss_simple": simple, "loss_vlb": bound}[what]()

    @cache
    def gradients() -> dict[str, Tensor]:
        kind = re.search(r"d\((l[12])", case.notes)
        network = raw.unet.requires_grad_(True)
        with torch.enable_grad():
            loss("same_noise", kind[1] if kind else config["params"]["loss_type"], "loss").backward()
        found = {name: weight.grad for name, weight in network.named_parameters()}
        holder = unet_from_official(case.state, config, prefix=official.UNET_PREFIX)
        holder.load_state_dict(
            {k: torch.zeros_like(v) if found[k] is None else found[k] for k, v in holder.state_dict().items()}
        )
        network.requires_grad_(False)
        return to_official(holder)

    # -- sampling --

    def guided(form: str | None) -> OfficialSampler:
        if form in (None, "noguid"):
            return OfficialSampler(raw)
        released = {"cfg_standard": None}.get(form, form)
        return OfficialSampler(raw, guidance_scale_of(released, sampling[f"{form}_scale"]))  # type: ignore[arg-type]

    @cache
    def condition() -> Given | None:
        if "prev" in given:
            where = list(range(given["prev"].shape[2]))
            return given_frames(raw, given["prev"], where, given["cond_noise"], sampling["level"], num_frames)
        if "ends" in given:
            ends = [0, num_frames - 1]
            return given_frames(raw, given["ends"], ends, given["cond_noise"], sampling["level"], num_frames)
        return None

    def ddim(form: str | None, eta: float, model: OfficialLatentDiffusion) -> list[tuple[Tensor, Tensor]]:
        steps = replace(guided(form), model=model).ddim(
            given["x_T"],
            num_sampling_steps=num_steps,
            eta=eta,
            draw_noise=lambda _: given["ddim_const_noise"],
            given=condition(),
        )
        return list(steps)

    def one_call(what: str) -> Tensor:
        conditioned = condition()
        assert conditioned is not None
        shown = torch.where(conditioned.frames > 0, conditioned.latents, given["x_T"])
        if what == "x_after":
            times = torch.zeros(len(shown), dtype=torch.int64)
            return OfficialSampler(raw).predict(given["x_T"], times, conditioned)[0]
        time = sampling.get("one_call_t") or time_of(
            lambda times: raw.unet(
                shown[:1].expand(len(times), -1, -1, -1, -1),
                times,
                mask=conditioned.told[:1].expand(len(times), -1, -1, -1, -1),
                noise_level=conditioned.level[:1].expand(len(times)),
            ),
            known["one_call.eps_cond"][:1],
        )
        times = torch.full((len(shown),), time)
        return {
            "eps_cond": lambda: OfficialSampler(raw).predict(given["x_T"], times, conditioned)[1],
            "eps_uncond_on_overwritten_x": lambda: raw.unet(shown, times),
            "eps_uncond_on_original_x": lambda: raw.unet(given["x_T"], times),
        }[what]()

    # Where the JSON doesn't tell the time of a call, it is the one at which the answer is as recorded.
    def time_of(answer: Callable[[Tensor], Tensor], recorded: Tensor) -> int:
        likely = [*range(0, process.num_timesteps, 100), *range(1, process.num_timesteps, 100)]
        for times in (torch.tensor(likely), torch.arange(process.num_timesteps)):
            off = torch.cat([(answer(some) - recorded).abs().flatten(1).amax(1) for some in times.split(50)])
            if off.min() < 1e-3 * recorded.abs().max():
                break
        return int(times[off.argmin()])

    def one_ddpm_step(form: str) -> tuple[Tensor, Tensor]:
        sampler, conditioned = guided(form), condition()
        assert conditioned is not None

        def foreseen(times: Tensor) -> Tensor:
            many = Given(
                *(part[:1].expand(len(times), *[-1] * (part.ndim - 1)) for part in vars(conditioned).values())
            )
            noisy = given["x_T"][:1].expand(len(times), -1, -1, -1, -1)
            noisy, prediction = sampler.predict(noisy, times, many)
            return process.to_sample(prediction, noisy, times)

        time = sampling.get("ddpm_one_step_t") or time_of(foreseen, known["ddpm_one_step.x0"][:1])
        steps = sampler.ddpm(
            given["x_T"],
            num_last_steps=time + 1,
            draw_noise=lambda i: given[f"ddpm_one_step.step_noise.{i:02d}"],
            given=conditioned,
        )
        return next(steps)

    def tape(start: str) -> Callable[[tuple[int, ...]], Tensor]:
        """The noises of a released script, in the order of their numbers."""
        names = sorted(
            (name for name in given if name.startswith(start)), key=lambda name: int(name.rsplit(".", 1)[1])
        )
        reel = iter(names)

        def draw(shape: tuple[int, ...]) -> Tensor:
            noise = given[next(reel)]
            assert tuple(noise.shape) == shape, "the script drew another shape here"
            return noise

        return draw

    def autoregression(kind: str) -> Tensor:
        ar = sampling["ar"]
        assert ar["sample_type"] == "ddim"
        marked = replace(averaged.compatibility, every_frame_marked=kind == "as_shipped")
        model = replace(averaged, compatibility=marked)
        return extend_by_autoregression(
            OfficialSampler(model, guidance_scale_of(ar["uc_type"], ar["uncond_scale"])),
            tape("ar."),
            shape=given["ar.randn.00"].shape,  # type: ignore[arg-type]
            num_extensions=ar["n_pred_steps"],
            num_given=ar["T_cond"],
            noise_level=ar["sample_cond_noise_level"],
            num_sampling_steps=ar["ddim_steps"],
            eta=ar["eta"],
        )

    @cache
    def interpolation() -> Tensor:
        told = sampling["interpolate"]
        assert told["sample_type"] == "ddim"
        return fill_gaps(
            OfficialSampler(averaged, guidance_scale_of(told["uc_type"], told["uncond_scale"])),
            given["base"],
            tape("interp."),
            noise_level=told["sample_cond_noise_level"],
            num_sampling_steps=told["ddim_steps"],
            eta=told["eta"],
            num_frames=num_frames,
        )

    def posterior_mean(sample: Tensor, noisy: Tensor) -> Tensor:
        first, second = (of_time(tables[f"posterior_mean_coef{i}"], noisy) for i in (1, 2))
        return first * sample + second * noisy

    def prior_bits() -> Tensor:
        # In the original's own order: what remains of these terms is their rounding in float32.
        mean = tables["sqrt_alphas_cumprod"][-1] * known["z"]
        logvar = tables["log_one_minus_alphas_cumprod"][-1].expand_as(mean)
        kl = 0.5 * (-1.0 - logvar + logvar.exp() + mean**2)
        return kl.flatten(1).mean(1) / math.log(2.0)

    def latents() -> Tensor:
        assert raw.autoencoder is not None
        sample = raw.autoencoder.encode(given["video"]).sample(given["posterior_noise"])
        return raw.autoencoder.normalize(sample)

    def noisy_in_training(which: str) -> tuple[Tensor, Condition]:
        noise, given_noise = noises(which)
        condition = given_in_training(given_noise)
        noisy = process.add_noise(given["z"], noise, given["t"])
        return noisy, condition

    def training_input(which: str) -> Tensor:
        seen: list[Tensor] = []

        def network(x: Tensor, timesteps: Tensor, **told: Tensor) -> Tensor:
            seen.append(x)
            return x

        noisy, condition = noisy_in_training(which)
        denoiser_of(network)(noisy, given["t"], condition)
        return seen[0]

    plain: dict[str, Callable[[], Tensor]] = {
        "z": latents,
        "q_sample": lambda: process.add_noise(known["z"], given["noise"], given["t"]),
        "eps_raw": lambda: raw.unet(known["q_sample"], given["t"]),
        "eps_ema": lambda: averaged.unet(known["q_sample"], given["t"]),
        "decoded": lambda: decode(raw, known["z"]),
        "decoded_sample": lambda: decode(raw, known["ddim.eta0"]),
        "decoded_sample_uint8": lambda: to_frames(raw, known["decoded_sample"]),
        "x0_from_eps": lambda: process.to_sample(known["eps_raw"], known["q_sample"], given["t"]),
        "posterior_mean": lambda: posterior_mean(known["x0_from_eps"], known["q_sample"]),
        "posterior_logvar": lambda: tables["posterior_log_variance_clipped"][given["t"]],
        "prior_bpd": prior_bits,
        "noisy_cond": lambda: process.add_noise(
            given["prev"], given["cond_noise"], torch.full((len(given["prev"]),), sampling["level"])
        ),
        "ddpm_one_step.x0": lambda: one_ddpm_step("cfg_original")[1],
        "interp.z_as_shipped": interpolation,
        "interp.video_as_shipped": lambda: decode(
            averaged, interpolation(), sampling["interpolate"]["max_z_t"]
        ),
        "grad.global_norm": lambda: torch.stack([g.norm() for g in gradients().values()]).norm(),
    }

    def compute(name: str) -> Tensor:
        if name in plain:
            return plain[name]()
        if found := re.fullmatch(r"decoded_max_z_t(\d+)", name):
            return decode(raw, known["z"], int(found[1]))
        if found := re.fullmatch(r"grad\.(.+)", name):
            return gradients()[found[1]]
        losses = r"p_losses(?:\.(same_noise|two_noises))?(\.x0)?(?:\.(l1|l2))?\.(loss|loss_simple|loss_vlb)"
        if found := re.fullmatch(losses, name):
            which, clean, kind, what = found.groups()
            kind = kind or config["params"].get("loss_type", "l2")
            return loss(which or "same_noise", kind, what, "sample" if clean else raw.prediction_type)
        if found := re.fullmatch(r"train_input_(same_noise|two_noises)", name):
            return training_input(found[1])
        if found := re.fullmatch(r"eps_train_(same_noise|two_noises)", name):
            noisy, condition = noisy_in_training(found[1])
            return denoiser_of(raw.unet)(noisy, given["t"], condition)
        if found := re.fullmatch(r"one_call\.(\w+)", name):
            return one_call(found[1])
        sampled = r"ddim\.eta([\d.]+?)(\.ema)?(?:\.(const_noise|pred_x0_first|x_after_first))?"
        if found := re.fullmatch(sampled, name):
            steps = ddim(None, float(found[1]), averaged if found[2] else raw)
            return {"pred_x0_first": steps[0][1], "x_after_first": steps[0][0]}.get(found[3], steps[-1][0])
        if found := re.fullmatch(r"ddim\.(noguid|cfg_\w+)", name):
            return ddim(found[1], 0.0, raw)[-1][0]
        if found := re.fullmatch(r"ddpm_one_step\.(cfg_\w+|noguid)", name):
            return one_ddpm_step(found[1])[0]
        if found := re.fullmatch(r"ddpm\.last(\d+)", name):
            return last(
                OfficialSampler(raw).ddpm(
                    given["x_T"],
                    num_last_steps=int(found[1]),
                    draw_noise=lambda i: given[f"ddpm.step_noise.{i:02d}"],
                )
            )
        if found := re.fullmatch(r"ar\.(as_shipped|mask_fixed)", name):
            return autoregression(found[1])
        raise Unknown(name)

    return compute


def averages(case: Case) -> Compute:
    """Moving averages over the updates of a case; `state.…` gives the final shadow of a weight."""

    def tree(tensors: dict[str, Tensor]) -> nn.Module:
        root = nn.Module()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            module = root
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, nn.Parameter(tensor.clone()))
        return root

    def numbered(prefix: str, i: int) -> dict[str, Tensor]:
        return {
            name.removeprefix(start): tensor
            for name, tensor in case.inputs.items()
            for start in (f"{prefix}{i}.",)
            if name.startswith(start)
        }

    init = {k.removeprefix("init."): v for k, v in case.inputs.items() if k.startswith("init.")}
    module = tree(init)
    ema = Ema({"module": module}, case.config["decay"])
    shadows: list[dict[str, Tensor]] = []
    for i in range(case.config["updates"]):
        with torch.no_grad():
            for name, tensor in numbered("step", i).items():
                module.get_parameter(name).copy_(tensor)
            for name, tensor in numbered("delta.", i).items():
                module.get_parameter(name).add_(tensor)
        ema.update(i + 1)
        shadow = {k.replace(".", ""): v.clone() for k, v in ema.modules["module"].state_dict().items()}
        shadows.append(shadow)

    def compute(name: str) -> Tensor:
        if found := re.fullmatch(r"step(\d+)\.(\w+)", name):
            return shadows[int(found[1])][found[2]]
        if found := re.fullmatch(r"state\.(\w+)", name):
            counters = {
                "decay": torch.tensor(case.config["decay"]),
                "num_updates": torch.tensor(case.config["updates"], dtype=torch.int32),
            }
            return (shadows[-1] | counters)[found[1]]
        raise Unknown(name)

    return compute


# ---- metrics ----

# The original's copy of I3D normalizes with torch's usual 1e-5 in place of the network's own 1e-3.
ORIGINAL_EPS = 1e-5


def i3d(case: Case) -> Compute:
    recipe = case.config["input_recipe"]
    stream = recipe_stream(recipe["seed"])
    if recipe["fn"] == "recipe_uniform":
        numbers = stream.uniform(recipe["lo"], recipe["hi"], size=recipe["shape"])
    else:
        numbers = stream.standard_normal(recipe["shape"])
    video = torch.from_numpy(numbers).float()
    network = I3d()
    network.load_state_dict(from_pytorch_i3d(case.state, ORIGINAL_EPS))
    return chosen_from({"logits": lambda: network(video), "pooled": lambda: network.pooled(video)})


def statistics(features: Tensor) -> GaussianStatistics:
    return GaussianStatistics(features.shape[1]).update(features)


def compared_sets(case: Case, pair: str) -> tuple[Tensor, Tensor]:
    """The two sets of features that an output compares: `ab` names them, `rankdef` is the wider pair."""
    if pair == "rankdef":
        sets = [case.inputs[name] for name in sorted(case.inputs) if case.inputs[name].ndim == 2]
        first, second = [features for features in sets if len(features) < features.shape[1]][:2]
        return first, second
    return case.inputs[pair[0]], case.inputs[pair[1]]


def distances(case: Case) -> Compute:
    def compute(name: str) -> Tensor:
        if found := re.fullmatch(r"fd_([a-z]+?)(_f64)?", name):
            x, y = (statistics(features) for features in compared_sets(case, found[1]))
            # The original computes in float32.
            arithmetic: Arithmetic = "float64" if found[2] else "float32_svd"
            return torch.tensor(frechet_distance(x, y, arithmetic), dtype=torch.float64)
        if found := re.fullmatch(r"kvd_([a-z]+)", name):
            return torch.tensor(kernel_distance(*compared_sets(case, found[1])), dtype=torch.float64)
        if found := re.fullmatch(r"cov_(\w)", name):
            return statistics(case.inputs[found[1]]).covariance
        if found := re.fullmatch(r"preprocess_(\d+)", name):
            video = rearrange(case.inputs["video_uint8"], "b t h w c -> b c t h w").float() / 127.5 - 1
            return resize_frames(video, int(found[1]))
        raise Unknown(name)

    return compute


def lpips(case: Case) -> Compute:
    state = case.state
    if case.config.get("lin_abs"):
        state = {key: value.abs() if key.startswith("lin") else value for key, value in state.items()}
    network = perceptual_distance("vgg", random=True)
    network.backbone.load_state_dict({k.removeprefix("net."): v for k, v in state.items() if k[:4] == "net."})
    network.heads.load_state_dict({k.removeprefix("lin"): v for k, v in state.items() if k[:3] == "lin"})
    for name in ("shift", "scale"):
        told = torch.tensor(case.config[name])
        torch.testing.assert_close(getattr(network.scaling, name).flatten(), told, rtol=1e-6, atol=0)

    def compute(name: str) -> Tensor:
        if name == "value":
            return rearrange(network(case.inputs["a"], case.inputs["b"]), "n -> n 1 1 1")
        if found := re.fullmatch(r"feat(\d)_mean_abs", name):
            features = list(network.backbone(network.scaling(case.inputs["a"])))
            return features[int(found[1])].abs().mean()
        raise Unknown(name)

    return compute


def chosen_from(computed: dict[str, Callable[[], Tensor]]) -> Compute:
    """Gives the output of a name, computed when it is asked for."""

    def compute(name: str) -> Tensor:
        if name not in computed:
            raise Unknown(name)
        return computed[name]()

    return compute


COMPUTING: dict[str, Callable[[Case], Compute]] = {
    "schedule": schedule,
    "ae_small": autoencoder,
    "ae_official": autoencoder,
    "ae_loss": autoencoder_loss,
    "disc": discriminator,
    "lpips": lpips,
    "unet_factorized": unet,
    "unet_plain": unet,
    "unet_conv3d": unet,
    "unet_framecond": unet,
    "ldm_short": latent_diffusion,
    "ldm_pred": latent_diffusion,
    "ldm_interp": latent_diffusion,
    "ema": averages,
    "fvd_kvd": distances,
    "i3d": i3d,
}
