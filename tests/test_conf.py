"""Every option file composes, fits the signature that it is for, and changes an output."""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from src.config import (
    CONF,
    EXPERIMENTS,
    AverageConfig,
    ConvertConfig,
    EmaSettings,
    EncodeConfig,
    EvaluateConfig,
    GuidanceSettings,
    LoggerSettings,
    PlanSettings,
    PrepareConfig,
    ReportConfig,
    SampleConfig,
    TrainConfig,
    build,
    check,
    read_yaml,
    typed,
)
from src.diffusion.parameterization import Parameterization
from src.model_folder import masking_of
from tests.composing import composed

OPTIONS: dict[str, list[str]] = {
    group.name: sorted(path.stem for path in group.glob("*.yaml"))
    for group in sorted(CONF.iterdir())
    if group.is_dir() and not group.name.startswith("_")
}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def digest(*values: Any) -> str:
    """A fingerprint of tensors and of anything with a faithful text."""
    text = [
        v.detach().double().numpy().tobytes() if isinstance(v, torch.Tensor) else repr(v).encode()
        for v in values
    ]
    return hashlib.sha256(b"|".join(text)).hexdigest()


def complaint_or(function: Callable[[], Any]) -> Any:
    """What a function gives, or the error that tells a user what is missing on this machine."""
    try:
        return function()
    except FileNotFoundError as error:
        return str(error)


def of_autoencoder(option: str) -> Any:
    if option == "pretrained":
        cfg = composed(
            "train", "stage=autoencoder", "autoencoder=pretrained", "autoencoder.folder=nowhere", "name=x"
        )
        return complaint_or(lambda: build(cfg.autoencoder))
    cfg = composed("train", "stage=autoencoder", f"autoencoder={option}", "name=x")
    torch.manual_seed(0)
    network = build(cfg.autoencoder).eval()
    video = torch.randn(1, 3, 8, 16, 16, generator=generator())
    with torch.no_grad():
        return network.encode(video).mean


def of_unet(option: str) -> Any:
    cfg = composed("train", f"unet={option}", "name=x", "autoencoder.folder=x")
    with torch.device("meta"):
        network = build(cfg.unet, in_channels=4, out_channels=4)
    return sum(p.numel() for p in network.parameters())


def of_attention(option: str) -> Any:
    cfg = composed("train", f"attention={option}", "name=x", "autoencoder.folder=x")
    torch.manual_seed(0)
    block = build(cfg.unet.attention)(channels=8, num_heads=2, head_channels=None, norm_groups=2)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, generator=generator())
    return block(torch.randn(1, 8, 3, 4, 4, generator=generator()))


def of_noise_schedule(option: str) -> Any:
    return build(
        composed("train", f"noise_schedule={option}", "name=x", "autoencoder.folder=x").noise_schedule
    )


def of_loss_weighting(option: str) -> Any:
    weighting = build(
        composed("train", f"loss_weighting={option}", "name=x", "autoencoder.folder=x").loss_weighting
    )
    table = build(composed("train", "name=x", "autoencoder.folder=x").noise_schedule)
    return weighting(Parameterization(table, "v"))


def of_conditioning(option: str) -> Any:
    cfg = composed("train", f"conditioning={option}", "name=x", "autoencoder.folder=x")
    masking = masking_of(OmegaConf.to_container(cfg.conditioning))
    draw = generator()
    return torch.stack([masking.mask(5, draw) for _ in range(50)])


def of_sampler(option: str) -> Any:
    sampler = build(composed("sample", f"sampler={option}", "model=x").sampler)
    noise = torch.randn(2, 1, 1, 2, 2, generator=generator())
    table = build(composed("train", "name=x", "autoencoder.folder=x").noise_schedule)
    return sampler(lambda x, t: 0.5 * x, noise, table, lambda i: torch.ones_like(noise))


def of_stage(option: str) -> Any:
    cfg = composed(
        "train", f"stage={option}", "name=x", *(["autoencoder.folder=x"] if option == "diffusion" else [])
    )
    check(cfg, TrainConfig)
    return cfg.stage._target_


def of_optimizer(option: str) -> Any:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build(composed("train", f"optimizer={option}", "name=x", "autoencoder.folder=x").optimizer)(
        [weight]
    )
    for _ in range(2):
        (weight * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        optimizer.step()
    return weight


def of_discriminator(option: str) -> Any:
    cfg = composed("train", "stage=autoencoder", f"discriminator={option}", "name=x")
    if cfg.discriminator is None:
        return None
    torch.manual_seed(0)
    return build(cfg.discriminator)(torch.randn(1, 3, 40, 40, generator=generator()))


def of_perceptual(option: str) -> Any:
    cfg = composed("train", "stage=autoencoder", f"perceptual={option}", "name=x")
    if cfg.perceptual is None:
        return None
    images = torch.randn(2, 3, 64, 64, generator=generator())
    return complaint_or(lambda: build(cfg.perceptual)(images[:1], images[1:]))


def of_dataset(option: str) -> Any:
    cfg = composed("train", f"dataset={option}", "name=x", "autoencoder.folder=x", "dataset.root=nowhere")
    if option.startswith("synthetic"):
        check(cfg, TrainConfig)
        return OmegaConf.to_yaml(cfg.dataset)
    return complaint_or(lambda: build(cfg.dataset, split="train", seed=0))


def of_plumbing(group: str, schema: type, verb: str) -> Callable[[str], Any]:
    def give(option: str) -> Any:
        extra = {"train": ["name=x", "autoencoder.folder=x"], "sample": ["model=x"]}[verb]
        return typed(composed(verb, f"{group}={option}", *extra), group, schema)

    return give


def of_protocol(option: str) -> Any:
    return build(composed("evaluate", f"protocol={option}", "model=x").protocol).digest


def of_preset(option: str) -> Any:
    return OmegaConf.to_yaml(composed("convert", f"preset={option}", "checkpoint=x", "output=y").preset)


def of_machine(option: str) -> Any:
    cfg = composed("train", f"machine={option}", "name=x", "autoencoder.folder=x")
    check(cfg, TrainConfig)
    overrides = ["name=x", "autoencoder.folder=x", f"machine={option}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = compose("train", overrides, return_hydra_config=True).hydra.launcher._target_
    return OmegaConf.to_yaml(cfg.machine) + launcher


def of_experiment(option: str) -> Any:
    if option.startswith("long_"):
        cfg = composed("sample", f"+experiment={option}")
        check(cfg, SampleConfig)
        trained = [cfg.model, cfg.interpolation.model] if cfg.interpolation.model else [cfg.model]
        for folder in trained:
            assert (CONF / "experiment" / f"{Path(folder).parent.name}.yaml").is_file()
        return OmegaConf.to_yaml(cfg)
    cfg = composed("train", f"+experiment={option}")
    check(cfg, TrainConfig)
    assert cfg.name in (option, f"{option}_{cfg.seed}"), "an experiment's run folder carries its name"
    return OmegaConf.to_yaml(cfg)


PROBES: dict[str, Callable[[str], Any]] = {
    "autoencoder": of_autoencoder,
    "unet": of_unet,
    "attention": of_attention,
    "noise_schedule": of_noise_schedule,
    "loss_weighting": of_loss_weighting,
    "conditioning": of_conditioning,
    "sampler": of_sampler,
    "stage": of_stage,
    "optimizer": of_optimizer,
    "discriminator": of_discriminator,
    "perceptual": of_perceptual,
    "dataset": of_dataset,
    "protocol": of_protocol,
    "machine": of_machine,
    "preset": of_preset,
    "experiment": of_experiment,
    "ema": of_plumbing("ema", EmaSettings, "train"),
    "logger": of_plumbing("logger", LoggerSettings, "train"),
    "guidance": of_plumbing("guidance", GuidanceSettings, "sample"),
    "plan": of_plumbing("plan", PlanSettings, "sample"),
}


def test_every_group_has_a_probe() -> None:
    assert set(OPTIONS) == set(PROBES)


@pytest.mark.parametrize("group", OPTIONS)
def test_every_option_changes_an_output(group: str) -> None:
    outputs = {option: digest(PROBES[group](option)) for option in OPTIONS[group]}
    for one, other in itertools.combinations(outputs, 2):
        assert outputs[one] != outputs[other], f"{group}={one} and {group}={other} do the same"


@pytest.mark.parametrize(
    "verb, schema, overrides",
    [
        ("train", TrainConfig, ["name=x", "autoencoder.folder=x"]),
        ("sample", SampleConfig, ["model=x"]),
        ("evaluate", EvaluateConfig, ["model=x"]),
        ("encode", EncodeConfig, ["model=x", "output=y"]),
        ("prepare", PrepareConfig, ["dataset=synthetic"]),
        ("convert", ConvertConfig, ["preset=short_sky", "checkpoint=x", "output=y"]),
        ("average", AverageConfig, ["run=x", "output=y"]),
        ("report", ReportConfig, ["runs=[x]", "output=y"]),
    ],
)
def test_every_verb_composes_and_holds_exactly_its_schema(
    verb: str, schema: type, overrides: list[str]
) -> None:
    check(composed(verb, *overrides), schema)


SWEEPS = sorted((EXPERIMENTS / "sweep").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=[path.stem for path in SWEEPS])
def test_every_sweep_composes_for_its_verb_and_names_its_command(path: Path) -> None:
    text = path.read_text()
    verb_name = "train" if "src.train" in text else "evaluate"
    cfg = composed(verb_name, f"+sweep={path.stem}")
    check(cfg, {"train": TrainConfig, "evaluate": EvaluateConfig}[verb_name])
    assert f"python -m src.{verb_name} +sweep={path.stem}" in text


EXPECTED = sorted((EXPERIMENTS / "expected").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPECTED, ids=[path.stem for path in EXPECTED])
def test_a_sweep_makes_the_cells_that_are_expected_of_it(path: Path) -> None:
    expected = read_yaml(path)
    sweep = read_yaml(EXPERIMENTS / "sweep" / path.name)
    assert expected["command"] == f"python -m src.evaluate +sweep={path.stem}"
    assert {expected["worse"], expected["better"], expected.get("baseline", expected["worse"])} <= {
        *expected["conditions"]
    }
    assert [*expected["conditions"]] == [*expected["cells"]]
    varied = {key: str(values).split(",") for key, values in sweep["hydra"]["sweeper"]["params"].items()}
    assert varied.pop("seed") == ["0", "1", "2"]
    made = []
    for values in itertools.product(*varied.values()):
        overrides = [f"{key}={value}" for key, value in zip(varied, values, strict=True)]
        cfg = composed("evaluate", f"+sweep={path.stem}", "seed=5", *overrides)
        made.append(cfg.output)
        # What trains the cell's model is told.
        trained = cfg.model.removeprefix("runs/").removesuffix("_5/model")
        assert trained in expected["training"]
    assert made == [f"{expected['folder']}/{name}_5/evaluation.json" for name in expected["cells"].values()]


TUNED_ONLY_BY_OPTION = ["autoencoder", "conditioning", "discriminator", "perceptual", "unet", "attention"]


@pytest.mark.parametrize(
    "group, option", [(group, option) for group in TUNED_ONLY_BY_OPTION for option in OPTIONS[group]]
)
def test_an_option_chosen_on_the_command_line_wins_over_the_experiment(group: str, option: str) -> None:
    """An experiment that sets keys of a group would silently change what the user chose instead."""
    stage = "autoencoder" if group in ("discriminator", "perceptual") else "diffusion"
    experiment = "tiny_autoencoder" if stage == "autoencoder" else "tiny"
    same = ["autoencoder_from=x", "name=x"] if stage == "diffusion" else ["name=x"]
    chosen = composed("train", f"+experiment={experiment}", f"{group}={option}", *same)
    plain = composed("train", f"stage={stage}", f"{group}={option}", *same)
    check(chosen, TrainConfig)
    if group == "attention":
        assert chosen.unet.attention == plain.unet.attention
    elif group == "unet":
        assert {k: v for k, v in chosen.unet.items() if k != "attention"} == {
            k: v for k, v in plain.unet.items() if k != "attention"
        }
    else:
        assert chosen[group] == plain[group]
