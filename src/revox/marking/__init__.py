"""Everything spoken is marked as synthetic: C2PA manifests, tags, headers, a log; and read back."""

from revox.marking.errors import MarkError
from revox.marking.mark import Marked, mark_bytes, mark_file, write_marked
from revox.marking.record import MarkRecord, new_record, stream_headers
from revox.marking.signer import Signer, can_sign, load_signer, state_folder

__all__ = [
    "MarkError",
    "MarkRecord",
    "Marked",
    "Signer",
    "can_sign",
    "load_signer",
    "mark_bytes",
    "mark_file",
    "new_record",
    "state_folder",
    "stream_headers",
    "write_marked",
]
