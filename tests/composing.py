"""Composes configs as the verbs do."""

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig

from src.config import CONF, _ExperimentsOnSearchPath


def composed(verb: str, *overrides: str) -> DictConfig:
    """The config of a verb with these overrides, as its function would get it."""
    if _ExperimentsOnSearchPath not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(_ExperimentsOnSearchPath)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(verb, overrides=list(overrides))
