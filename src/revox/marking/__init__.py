"""Everything spoken is marked as synthetic: C2PA manifests, tags, headers, a log; and marks are read back."""

from revox.marking.errors import MarkError
from revox.marking.log import log_mark
from revox.marking.manifest import load_signer
from revox.marking.mark import how_marked, mark_bytes, write_marked, write_marked_parts
from revox.marking.record import MarkRecord, new_record, stream_headers
from revox.marking.signer import Signer, can_sign, state_folder
from revox.marking.verify import Verification, verify_bytes, verify_file

__all__ = [
    "MarkError",
    "MarkRecord",
    "Signer",
    "Verification",
    "can_sign",
    "how_marked",
    "load_signer",
    "log_mark",
    "mark_bytes",
    "new_record",
    "state_folder",
    "stream_headers",
    "verify_bytes",
    "verify_file",
    "write_marked",
    "write_marked_parts",
]
