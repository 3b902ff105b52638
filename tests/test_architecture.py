"""The house's rules that a machine can check."""

import ast
import configparser
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def test_floors_are_kept() -> None:
    result = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


def test_packages_are_listed_for_the_wheel() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {f"latent_video.{path.parent.name}" for path in (ROOT / "src").glob("*/__init__.py")}
    assert listed == found | {"latent_video", "latent_video.conf", "latent_video.experiments"}


def test_conda_asks_for_the_same_as_pip() -> None:
    """environment.yml installs this project by pip, so packages and bounds are setup.cfg's own."""
    import yaml

    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    python, pip, by_pip = environment["dependencies"]
    assert python.split() == ["python", config["options"]["python_requires"]]
    assert pip == "pip" and by_pip == {"pip": ["-e ."]}


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_imports_inside_the_package_are_relative(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module or "")
        assert not any(name.split(".")[0] in ("src", "latent_video") for name in names)


@pytest.mark.parametrize("name", ["autoencoder", "diffusion"])
def test_a_stage_never_yields_inside_a_with(name: str) -> None:
    """A context that is open while the loop runs (autocast, no_grad) would leak into the loop."""
    tree = ast.parse((ROOT / "src" / "stages" / f"{name}.py").read_text())
    updates = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "updates"
    ]
    assert any(isinstance(node, ast.Yield) for node in ast.walk(updates[0]))
    for node in ast.walk(updates[0]):
        if isinstance(node, ast.With):
            assert not any(isinstance(inner, ast.Yield) for inner in ast.walk(node))


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_nothing_reads_weights_by_running_code(path: Path) -> None:
    """Other people's files are read by torch's own restricted unpickler or by that of checkpoint_file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "torch.load",
            "pickle.load",
            "pickle.loads",
        ):
            told = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert told.get("weights_only") == "True" or told.get("pickle_module") == "_inert_pickle"


def test_the_readme_names_every_option() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "conf").glob("*/*.yaml"):
        if path.parent.name not in ("experiment", "hydra"):
            assert re.search(rf"`{path.stem}`", readme), f"README doesn't name {path.parent.name}={path.stem}"


@pytest.mark.slow
def test_the_wheel_works_from_any_folder(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--installer=uv", "-o", str(tmp_path / "dist"), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = (tmp_path / "dist").glob("latent_video-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert {path.name.split("-")[0] for path in (tmp_path / "site").iterdir()} == {"latent_video"}
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip

    run("latent_video.train", "+experiment=tiny_autoencoder", "train.num_steps=2")
    assert (tmp_path / "runs/tiny_autoencoder/model/weights.safetensors").is_file()
    assert "train" in run("latent_video")
