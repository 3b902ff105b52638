"""A released checkpoint in miniature, converted and used as a user would, and back."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from src.convert import export, import_checkpoint, plain_of
from src.interop import official, official_configs
from src.interop.checkpoint_file import read_checkpoint
from src.model_folder import load_autoencoder, load_diffusion
from src.models.autoencoder import Autoencoder3d
from tests.parity.conftest import COMPACT, Case, read_case, relative_error

ROOT = Path(__file__).parents[2]


class Callback:
    """A class as Lightning uses one for a key."""


@pytest.fixture(scope="module")
def case() -> Case:
    return read_case(COMPACT, "ldm_short")


@pytest.fixture(scope="module")
def released(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model.ckpt``, as Lightning writes it, and the released code's ``model.yaml``."""
    folder = tmp_path_factory.mktemp("released")
    tables = official.schedule_tables(
        official.parameterization(
            official_configs.schedule_arguments(case.config["params"]), "epsilon"
        ).alphas_cumprod
    )
    counters = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    }
    content = {
        "state_dict": case.whole_state | tables | counters,
        "global_step": 4321,
        "callbacks": {Callback: {"best_model_score": torch.tensor(0.1)}},
        "hyper_parameters": OmegaConf.create({"learning_rate": 6e-5, "of": "${learning_rate}"}),
    }
    torch.save(content, folder / "model.ckpt")
    told: Any = deepcopy({key: case.config[key] for key in ("target", "params")})
    # As in the released files: what the command line fills in, what is said though it is the default.
    parts = told["params"]
    parts["unet_config"]["params"] |= {"use_temporal_transformer": False, "use_checkpoint": True}
    parts["first_stage_config"]["params"]["ckpt_path"] = "${ckpt_path}"
    data = {"params": {"train": {"params": {"data_root": "${data_root}", "frame_stride": 2}}}}
    whole = OmegaConf.create({"model": told, "data": data, "lightning": {"trainer": {}}})
    OmegaConf.save(whole, folder / "model.yaml")
    return folder


def verb(name: str, *arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a verb in a folder."""
    result = subprocess.run(
        [sys.executable, "-m", f"src.{name}", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def converted(released: Path, folder: Path, use_ema: bool = True) -> Path:
    described = plain_of(OmegaConf.load(released / "model.yaml"))
    import_checkpoint(released / "model.ckpt", described, folder, use_ema)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("use_ema", [True, False])
def test_the_model_folder_computes_what_the_checkpoint_did(
    case: Case, released: Path, tmp_path: Path, use_ema: bool
) -> None:
    model = load_diffusion(str(converted(released, tmp_path / "model", use_ema)))
    known, given = case.outputs, case.inputs
    predicted = model.unet(known["q_sample"], given["t"])
    assert relative_error(predicted, known["eps_ema" if use_ema else "eps_raw"]) <= 1e-4
    assert relative_error(predicted, known["eps_raw" if use_ema else "eps_ema"]) > 1e-2
    latents = model.autoencoder.normalize(
        model.autoencoder.encode(given["video"]).sample(given["posterior_noise"])
    )
    assert relative_error(latents, known["z"]) <= 1e-4
    assert (
        relative_error(model.autoencoder.decode(model.autoencoder.denormalize(known["z"])), known["decoded"])
        <= 1e-4
    )
    assert model.window == (4, 4, 8, 8) and model.step == 4321
    assert (model.data.num_frames, model.data.resolution) == (8, [16, 16])
    assert model.data.frame_stride == 2


def test_the_verbs_take_it_as_one_of_ours(case: Case, released: Path, tmp_path: Path) -> None:
    told = verb(
        "convert",
        f"checkpoint={released}/model.ckpt",
        f"config={released}/model.yaml",
        "output=converted",
        cwd=tmp_path,
    )
    assert "averaged weights" in told.stdout
    data = ["dataset=synthetic_tiny", "dataset.root=data", "dataset.cache=cache"]
    verb("sample", "model=converted", "num_samples=2", "output=samples", cwd=tmp_path)
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 2
    verb(
        "evaluate", "model=converted", *data, "protocol=quick", "protocol.features=null",
        "protocol.num_real=4", "protocol.num_generated=2", "output=evaluation.json", cwd=tmp_path,
    )  # fmt: skip
    assert "reconstruction_psnr" in json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    # Its network goes on learning, on its autoencoder's latents.
    architecture = [
        "unet=tiny", "unet.model_channels=32", "unet.channel_mult=[1,1]", "unet.attention_downsamples=[2]",
        "unet.num_heads=2", "unet.norm_groups=32", "unet.attention.max_distance=4",
        "unet.attention.relative_position_as_released=true", "unet.checkpoint=true",
    ]  # fmt: skip
    run = [
        "+experiment=tiny", "name=tuned", *data, "dataset.num_frames=8", "dataset.resolution=16",
        "autoencoder.folder=converted", "latents=null", "class_conditional=false", "conditioning=none",
        "noise_schedule=linear", "prediction_type=epsilon", "train.num_steps=2", "train.save_every=0",
        "start_from=converted",
    ]  # fmt: skip
    verb("train", *run, *architecture, "optimizer.lr=0", "ema=none", cwd=tmp_path)
    before = load_file(tmp_path / "converted/weights.safetensors")
    after = load_file(tmp_path / "runs/tuned/model/weights.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before.keys() | after.keys())
    other = verb("train", *run, "name=other", *architecture, "unet.num_heads=4", cwd=tmp_path, check=False)
    assert other.returncode == 2 and "num_heads: 2 -> 4" in other.stderr


def test_there_and_back_again(released: Path, tmp_path: Path) -> None:
    """Folder, file, folder: the same bytes; and the file has all the keys of a released one."""
    first = converted(released, tmp_path / "first")
    export(first, tmp_path / "back.ckpt")
    state, step = read_checkpoint(tmp_path / "back.ckpt")
    original, _ = read_checkpoint(released / "model.ckpt")
    assert state.keys() == original.keys() and step == 4321
    averaged = "model_ema.diffusion_modelout2weight"
    assert torch.equal(state[averaged], original[averaged])
    assert torch.equal(state["model.diffusion_model.out.2.weight"], original[averaged])
    again = converted_again(tmp_path)
    for name in ("weights.safetensors", "autoencoder/weights.safetensors", "config.yaml"):
        assert (again / name).read_bytes() == (first / name).read_bytes(), name


def converted_again(folder: Path) -> Path:
    described: Any = OmegaConf.to_container(OmegaConf.load(folder / "back.yaml"))
    import_checkpoint(folder / "back.ckpt", described, folder / "again", use_ema=True)
    return folder / "again"


def test_the_stride_of_key_latents_goes_there_and_back(released: Path, tmp_path: Path) -> None:
    described = plain_of(OmegaConf.load(released / "model.yaml"))
    described["model"]["params"]["latent_frame_strde"] = 4
    import_checkpoint(released / "model.ckpt", described, tmp_path / "first", True)
    first = load_diffusion(str(tmp_path / "first"))
    assert first.latent_strides == (4,) and first.window == (4, 4, 8, 8) and first.data.num_frames == 32
    export(tmp_path / "first", tmp_path / "back.ckpt")
    back = plain_of(OmegaConf.load(tmp_path / "back.yaml"))
    assert back["model"]["params"]["latent_frame_strde"] == 4
    import_checkpoint(tmp_path / "back.ckpt", back, tmp_path / "second", True)
    assert load_diffusion(str(tmp_path / "second")).latent_strides == (4,)


def test_windows_shorter_than_the_attentions_tables_stay_short(released: Path, tmp_path: Path) -> None:
    described = plain_of(OmegaConf.load(released / "model.yaml"))
    state, _ = read_checkpoint(released / "model.ckpt")
    wider = {k: torch.randn(33, v.shape[1]) for k, v in state.items() if k.endswith("embeddings_table")}
    torch.save({"state_dict": state | wider}, tmp_path / "wide.ckpt")
    described["model"]["params"]["unet_config"]["params"]["temporal_length"] = 16
    import_checkpoint(tmp_path / "wide.ckpt", described, tmp_path / "model", use_ema=False)
    export(tmp_path / "model", tmp_path / "back.ckpt")
    again = converted_again(tmp_path)
    assert (again / "config.yaml").read_bytes() == (tmp_path / "model/config.yaml").read_bytes()
    assert load_diffusion(str(again)).window == (4, 4, 8, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_precision_come_in_single(
    released: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    state, _ = read_checkpoint(released / "model.ckpt")
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    torch.save({f"module.{k}": v for k, v in cast.items()}, tmp_path / "cast.ckpt")
    described = plain_of(OmegaConf.load(released / "model.yaml"))
    import_checkpoint(tmp_path / "cast.ckpt", described, tmp_path / "model", use_ema=False)
    weight = load_file(tmp_path / "model/weights.safetensors")["time_embedding.0.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, cast["model.diffusion_model.time_embed.0.weight"].float())


def test_an_autoencoder_alone(case: Case, tmp_path: Path) -> None:
    start = official.AUTOENCODER_PREFIX
    weights = {k.removeprefix(start): v for k, v in case.whole_state.items() if k.startswith(start)}
    torch.save({"state_dict": weights | {"loss.logvar": torch.zeros(())}}, tmp_path / "ae.ckpt")
    params = case.config["params"]["first_stage_config"]["params"] | {
        "scale_factor": 0.5,
        "shift_factor": 2.0,
    }
    described = {"model": {"params": params}, "data": {"num_frames": 8, "resolution": [16, 16]}}
    import_checkpoint(tmp_path / "ae.ckpt", described, tmp_path / "ae", use_ema=True)
    autoencoder = load_autoencoder(str(tmp_path / "ae"))
    assert autoencoder.latent_mean.tolist() == [-2.0] * 4 and autoencoder.latent_std.tolist() == [2.0] * 4
    export(tmp_path / "ae", tmp_path / "back.ckpt")
    state, _ = read_checkpoint(tmp_path / "back.ckpt")
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], weights[key]) for key in weights)


@torch.no_grad()
def test_moments_are_folded_into_the_waist() -> None:
    """What it encodes and decodes normalized stays the same, with nothing left to normalize."""
    torch.manual_seed(0)
    autoencoder = Autoencoder3d(hidden_channels=16, downsample=(1, 2, 2)).double()
    autoencoder.latent_mean.copy_(torch.tensor([1.0, -2.0, 0.5, 0.0]))
    autoencoder.latent_std.copy_(torch.tensor([0.5, 3.0, 1.0, 2.0]))
    folded = official.fold_moments(autoencoder)
    video = torch.randn(1, 3, 2, 8, 8, dtype=torch.float64)
    before, after = autoencoder.encode(video), folded.encode(video)
    torch.testing.assert_close(after.mean, autoencoder.normalize(before.mean), rtol=0, atol=1e-10)
    std = before.std / autoencoder.latent_std.view(-1, 1, 1, 1)
    torch.testing.assert_close(after.std, std, rtol=0, atol=1e-10)
    latents = torch.randn(1, 4, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(
        folded.decode(latents), autoencoder.decode(autoencoder.denormalize(latents)), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(
    "name", ["unet_factorized", "unet_plain", "unet_conv3d", "unet_framecond", "ldm_short", "ldm_pred"]
)
def test_a_config_goes_there_and_back(name: str) -> None:
    config = read_case(COMPACT, name).config
    arguments = official_configs.unet_arguments(config, True)
    back = official_configs.unet_config(arguments)
    assert official_configs.unet_arguments(back, True) == arguments


Broken = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda s: {k: v for k, v in s.items() if "out.2.weight" not in k}, r"missing \['out\.2\.weight'\]"),
        (lambda s: s | {"model.diffusion_model.new": torch.zeros(1)}, r"left over \['new'\]"),
        (lambda s: s | {"cond_stage_model.w": torch.zeros(1)}, r"left over \['cond_stage_model\.w'\]"),
        (
            lambda s: {k: v for k, v in s.items() if k != "model_ema.diffusion_modelout2weight"},
            r"missing \['model_ema\.diffusion_modelout2weight'\]",
        ),
        (lambda s: s | {"betas": s["betas"] * 1.1}, "betas isn't that of its config's schedule"),
        (lambda s: s | {"betas": s["betas"].half() * 1.1}, "betas isn't that of its config's schedule"),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("model_ema.")},
            r"averaged weights .* missing: take the raw ones with use_ema=false",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k.startswith("first_stage_model.")},
            "no diffusion model, perhaps an autoencoder, the config describes a whole latent diffusion model",
        ),
        (
            lambda s: s | {"model.diffusion_model.out.2.bias": torch.full((4,), torch.nan)},
            r"aren't finite, in 1 of \d+ tensors \(first model.diffusion_model.out.2.bias\)",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "diffusion_model.middle_block" not in k},
            r"missing \['middle_block.*, …\] \(\d\d in all\)",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "first_stage_model.quant_conv.conv.bias"},
            r"missing \['quant_conv\.conv\.bias'\]",
        ),
        (lambda s: {k: v for k, v in s.items() if "first_stage" not in k}, "holds no autoencoder"),
        (
            lambda s: (
                s | {"first_stage_model.quant_conv.weight": s["first_stage_model.quant_conv.weight"] + 1}
            ),
            r"unlike the tensor that they double \['quant_conv\.weight'\]",
        ),
    ],
)
def test_a_checkpoint_that_doesnt_fit_is_refused(
    released: Path, tmp_path: Path, damage: Broken, complaint: str
) -> None:
    state, _ = read_checkpoint(released / "model.ckpt")
    torch.save({"state_dict": damage(state)}, tmp_path / "broken.ckpt")
    described = plain_of(OmegaConf.load(released / "model.yaml"))
    with pytest.raises(ValueError, match=complaint):
        import_checkpoint(tmp_path / "broken.ckpt", described, tmp_path / "model", use_ema=True)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["checkpoint=x.ckpt", "output=out"], "either preset=NAME"),
        (["checkpoint=x.ckpt", "output=out", "preset=short_sky", "config=x.yaml"], "either preset=NAME"),
        (["checkpoint=x.ckpt", "output=out", "preset=short_sky"], "no checkpoint file at x.ckpt"),
        (["checkpoint=x.ckpt", "output=out", "config=none.yaml"], "no file at config=none.yaml"),
        (["checkpoint=x.ckpt", "output=out", "direction=back"], "choose import or export"),
        (["checkpoint=none", "output=out.ckpt", "direction=export"], "no model at none"),
        (["checkpoint=none", "output=out", "direction=export", "use_ema=false"], "leave use_ema away"),
        (["checkpoint=x.ckpt", "output=", "preset=short_sky"], "output= is empty"),
    ],
)
def test_what_is_asked_wrongly_is_told(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    result = verb("convert", *arguments, cwd=tmp_path, check=False)
    assert result.returncode == 2 and complaint in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("yaml", "complaint"),
    [
        ("model: x", "describes no model"),
        ("", "describes no model"),
        ("[1, 2]", "describes no model"),
        ("model: {params: {embed_dim: 4, ddconfig: {z_channels: 4}}}", "can't be understood"),
        ("model: {params: {embed_dim: abc, ddconfig: 3}}", "can't be understood"),
    ],
)
def test_a_config_that_makes_no_sense_is_told(tmp_path: Path, yaml: str, complaint: str) -> None:
    (tmp_path / "model.yaml").write_text(yaml)
    torch.save({"state_dict": {"encoder.x": torch.zeros(1)}}, tmp_path / "x.ckpt")
    arguments = ["checkpoint=x.ckpt", "config=model.yaml", "output=out"]
    result = verb("convert", *arguments, cwd=tmp_path, check=False)
    assert result.returncode == 2 and complaint in result.stderr and "Traceback" not in result.stderr


def test_nothing_is_overwritten(released: Path, tmp_path: Path) -> None:
    model = converted(released, tmp_path / "model")
    before = (model / "weights.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        converted(released, model, use_ema=False)
    (tmp_path / "out.yaml").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        export(model, tmp_path / "out.ckpt")
    assert (model / "weights.safetensors").read_bytes() == before
    assert (tmp_path / "out.yaml").read_text() == "mine" and not (tmp_path / "out.ckpt").exists()


def test_what_the_released_code_cant_express_is_named(tmp_path: Path) -> None:
    """A network of ours with textbook relative position would be another one there."""
    torch.manual_seed(0)
    from src.config import build
    from tests.composing import composed

    cfg = composed("train", "+experiment=tiny", "autoencoder_from=x")
    unet = build(cfg.unet, in_channels=4, out_channels=4)
    with pytest.raises(ValueError, match=r"8 groups instead of 32.*textbook"):
        official.to_official(unet)
    joint = build(composed("train", "attention=joint", "name=x", "autoencoder_from=x", "unet=base",
                           "unet.model_channels=32").unet, in_channels=4, out_channels=4)  # fmt: skip
    with pytest.raises(ValueError, match="factorized into space and then time"):
        official.to_official(joint)
    with pytest.raises(ValueError, match="frame by frame"):
        official.to_official(Autoencoder3d(hidden_channels=16, norm="frame"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"prediction_type": "v"}, "prediction_type=v"),
        (
            {
                "prediction_type": "sample",
                "noise_schedule": {
                    "_target_": ".diffusion.noise_schedule.rescale_to_zero_terminal_snr",
                    "alphas_cumprod": {
                        "_target_": ".diffusion.noise_schedule.linear",
                        "num_timesteps": 1000,
                        "beta_start": 0.0015,
                        "beta_end": 0.0155,
                    },
                },
            },
            "the noise schedule rescale_to_zero_terminal_snr",
        ),
        ({"latent_strides": [2]}, r"latent_strides=\[2\] \(\[1\] and \[4\] can be"),
        (
            {
                "conditioning": {
                    "_target_": ".diffusion.conditioning.FrameMasking",
                    "prediction": 0.5,
                    "interpolation": 0.0,
                    "num_given": [1],
                    "max_noise_level": 10,
                    "class_dropout": 0.0,
                    "noise_level_per_frame": True,
                }
            },
            "noise levels of single frames",
        ),
    ],
)
def test_what_the_released_code_cant_sample_isnt_exported(
    released: Path, tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    path = converted(released, tmp_path / "model") / "config.yaml"
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(config, dict)
    OmegaConf.save(OmegaConf.create({**config, **change}), path)
    with pytest.raises(ValueError, match=f"can't express this model: .*{complaint}"):
        export(tmp_path / "model", tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()
