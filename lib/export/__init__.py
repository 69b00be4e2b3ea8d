"""Export: a trained model in the files of other programs, checked by loading it again, and pushed to the hub."""

from lib.export.checked import TOLERANCE, export
from lib.export.sample import Sample, noise_and_texts

__all__ = ["TOLERANCE", "Sample", "export", "noise_and_texts"]
