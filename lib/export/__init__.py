"""Export: a trained model in the files of other programs, checked by loading it again, and pushed to the hub."""

from lib.export.checked import export
from lib.export.formats import noise_and_texts

__all__ = ["export", "noise_and_texts"]
