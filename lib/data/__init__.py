"""Image-text pairs: sources, decoding, order, chunks for training and sets for evaluation."""

from lib.data.batch import Chunk
from lib.data.evaluation_set import EvaluationSet
from lib.data.images import BadImage, decode_image
from lib.data.pairs import IndexedSource, Skip, Source
from lib.data.pipeline import ImagePipeline
from lib.data.prepare import Prepare
from lib.data.sources import open_evaluation, open_sources
from lib.data.training import Counts, StepChunks, TrainingData

__all__ = [
    "BadImage",
    "Chunk",
    "Counts",
    "EvaluationSet",
    "ImagePipeline",
    "IndexedSource",
    "Prepare",
    "Skip",
    "Source",
    "StepChunks",
    "TrainingData",
    "decode_image",
    "open_evaluation",
    "open_sources",
]
