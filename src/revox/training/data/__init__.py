"""Speech to train on, with lhotse: manifests of folders and hubs, Shar shards, balanced batches."""

from revox.training.data.errors import DataError
from revox.training.data.loading import ClipBatch, ClipBatches
from revox.training.data.manifest import Manifest
from revox.training.data.quality import SourceReport, report
from revox.training.data.sampling import ClipSampler
from revox.training.data.sources import SpeechSource, find_sources

__all__ = [
    "ClipBatch",
    "ClipBatches",
    "ClipSampler",
    "DataError",
    "Manifest",
    "SourceReport",
    "SpeechSource",
    "find_sources",
    "report",
]
