"""Speech to train on: what lies in folders and hubs, packed, drawn in balance, decoded in workers."""

from revox.training.data.errors import DataError
from revox.training.data.loading import ClipBatch, ClipBatches, clip_batches
from revox.training.data.quality import SourceReport, report
from revox.training.data.sampling import ClipSampler, Draw
from revox.training.data.shards import pack
from revox.training.data.sources import Source, find_sources
from revox.training.data.table import Clip, ClipTable

__all__ = [
    "Clip",
    "ClipBatch",
    "ClipBatches",
    "ClipSampler",
    "ClipTable",
    "DataError",
    "Draw",
    "Source",
    "SourceReport",
    "clip_batches",
    "find_sources",
    "pack",
    "report",
]
