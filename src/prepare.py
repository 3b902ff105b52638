"""Fetch and check what other verbs need: ``python -m src.prepare dataset=ucf101``, ``… weights=i3d``."""

from omegaconf import DictConfig

from .config import ConfigError, PrepareConfig, build, verb


@verb("prepare", PrepareConfig)
def main(cfg: DictConfig) -> None:
    """Installs weights, or reads a data set once so that training starts at once."""
    if cfg.weights is None and cfg.get("dataset") is None:
        raise ConfigError("nothing to prepare: give dataset=NAME or weights=i3d")
    if cfg.weights is not None:
        if cfg.weights != "i3d":
            raise ConfigError(f"unknown weights={cfg.weights}; known: i3d")
        from .metrics.i3d import install_i3d

        print(f"I3D weights: {install_i3d()}")
    if cfg.get("dataset") is not None:
        for split in ("train", "test"):
            dataset = build(cfg.dataset, split=split, seed=0)
            print(f"{split}: {dataset.summary()}")


if __name__ == "__main__":
    main()
