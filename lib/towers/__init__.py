"""Image and text towers: CLIP and SigLIP models of transformers, and pairs composed of two encoders."""

from lib.towers.load import load_towers
from lib.towers.presets import PRESETS, build_preset
from lib.towers.two_towers import FREEZABLE, TowerOutput, TwoTowers

__all__ = ["FREEZABLE", "PRESETS", "TowerOutput", "TwoTowers", "build_preset", "load_towers"]
