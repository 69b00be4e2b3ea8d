"""Image and text towers: dual encoders of transformers (CLIP, SigLIP, ...), and pairs composed of two encoders."""

from lib.towers.load import PRESETS, Family, build_preset, load_towers
from lib.towers.two_towers import TowerOutput, TwoTowers

__all__ = ["PRESETS", "Family", "TowerOutput", "TwoTowers", "build_preset", "load_towers"]
