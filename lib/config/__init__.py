"""Every setting of a training run: a module for each group of flags, where they come from, and their checks."""

from lib.config.command_line import parse_config
from lib.config.fitted import FITTED, FittedConfig
from lib.config.flags import flag
from lib.config.train_config import TrainConfig
from lib.config.yaml_file import changed_settings, save_config

__all__ = ["FITTED", "FittedConfig", "TrainConfig", "changed_settings", "flag", "parse_config", "save_config"]
