"""What other libraries' networks say to made-up weights and videos.

``python -m tests.recorded_features`` records it. That needs the packages transformers, pytorch-fid and
cd-fvd; the tests that use the recording don't. Weights and videos are functions of their position, so that
only answers must be kept.
"""

import functools
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from src.metrics.torchvision_import import declare_torchvision_operators

RECORD = Path(__file__).parent / "unit" / "recorded_features.json"
SMALL = {"dim": 16, "depth": 2, "num_heads": 2, "hidden": 40, "size": 16, "num_frames": 8, "tubelet": 2,
         "patch": 4, "num_classes": 5}  # fmt: skip
# The grid of positions is fixed in cd-fvd's code; the rest is small.
THIN = SMALL | {"size": 224, "num_frames": 16, "patch": 14, "depth": 1, "hidden": int(16 * 48 / 11)}


def scattered(*shape: int, seed: int) -> Tensor:
    """Numbers in [0, 1) without a pattern, the same everywhere."""
    position = torch.arange(math.prod(shape), dtype=torch.float64) + 1e4 * seed
    return ((12.9898 * position).sin() * 43758.5453).frac().abs().reshape(shape).float()


def made_up_state(network: nn.Module) -> dict[str, Tensor]:
    """Weights under which activations neither vanish nor explode."""
    state = {}
    for seed, (name, old) in enumerate(sorted(network.state_dict().items())):
        values = scattered(*old.shape, seed=seed)
        if not old.is_floating_point():
            state[name] = old
        elif name.endswith("running_var"):
            state[name] = 0.5 + values
        elif old.ndim == 1:
            state[name] = (values - 0.5) * 0.4 + (1 if name.endswith("weight") else 0)
        else:
            state[name] = (values - 0.5) * math.sqrt(24 / old[0].numel())
    return state


def video(frames: int, size: int) -> Tensor:
    return 2 * scattered(1, 3, frames, size, size, seed=77) - 1


@torch.no_grad()
def transformers_videomae(state: dict[str, Tensor], frames: Tensor) -> Tensor:
    """Features of the VideoMAE of the package transformers under our names of `SMALL`."""
    declare_torchvision_operators()
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        image_size=SMALL["size"],
        patch_size=SMALL["patch"],
        num_frames=SMALL["num_frames"],
        tubelet_size=SMALL["tubelet"],
        hidden_size=SMALL["dim"],
        num_hidden_layers=SMALL["depth"],
        num_attention_heads=SMALL["num_heads"],
        intermediate_size=SMALL["hidden"],
        num_labels=SMALL["num_classes"],
        layer_norm_eps=1e-6,
        use_mean_pooling=True,
    )
    network = VideoMAEForVideoClassification(config).eval()
    network.fc_norm.eps = 1e-6
    words = [
        ("patch_embed.proj", "videomae.embeddings.patch_embeddings.projection"),
        ("blocks.", "videomae.encoder.layer."),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("attn.q_bias", "attention.attention.query.bias"),
        ("attn.v_bias", "attention.attention.value.bias"),
        ("attn.proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
        ("head", "classifier"),
    ]
    theirs = {}
    for name, tensor in state.items():
        for ours, other in words:
            name = name.replace(ours, other)
        if "attn.qkv.weight" in name:
            for part, matrix in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                theirs[name.replace("attn.qkv", f"attention.attention.{part}")] = matrix
        else:
            theirs[name] = tensor
    network.load_state_dict(theirs)
    network.classifier = nn.Identity()
    return network((frames.transpose(1, 2) + 1) / 2).logits


@torch.no_grad()
def cdfvd_videomae(state: dict[str, Tensor], frames: Tensor) -> Tensor:
    """Features of the VideoMAE V2 in the package cd-fvd under our names of `THIN`."""
    declare_torchvision_operators()
    from cdfvd.third_party.VideoMAEv2.videomaev2_finetune import VisionTransformer

    network = VisionTransformer(
        img_size=THIN["size"],
        patch_size=THIN["patch"],
        embed_dim=THIN["dim"],
        depth=THIN["depth"],
        num_heads=THIN["num_heads"],
        mlp_ratio=48 / 11,
        qkv_bias=True,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        num_classes=THIN["num_classes"],
    ).eval()
    network.load_state_dict(state)
    return network.forward_features((frames + 1) / 2)


@torch.no_grad()
def pytorch_fid_inception(state: dict[str, Tensor], frames: Tensor) -> Tensor:
    """Every 64th feature of each frame, of the Inception-v3 of the package pytorch-fid."""
    declare_torchvision_operators()
    from pytorch_fid import inception

    inception.load_state_dict_from_url = lambda *_, **__: state
    network = inception.InceptionV3().eval()
    features = [network((frames[:, :, t] + 1) / 2)[0][:, :, 0, 0] for t in range(frames.shape[2])]
    return torch.stack(features, 1)[..., ::64]


def main() -> None:
    from src.metrics.inception import InceptionV3
    from src.metrics.videomae import VideoMae

    inception = InceptionV3()
    answers = {
        "transformers_videomae": transformers_videomae(made_up_state(VideoMae(**SMALL)), video(8, 16)),
        "cdfvd_videomae_16": cdfvd_videomae(made_up_state(VideoMae(**THIN)), video(16, 224)),
        "cdfvd_videomae_36": cdfvd_videomae(made_up_state(VideoMae(**THIN)), video(36, 224)),
        "pytorch_fid_inception": pytorch_fid_inception(made_up_state(inception.network), video(2, 299)),
    }
    RECORD.write_text(json.dumps({name: answer.tolist() for name, answer in answers.items()}) + "\n")


if __name__ == "__main__":
    main()
