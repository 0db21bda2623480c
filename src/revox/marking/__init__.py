"""Everything spoken is marked as synthetic: C2PA manifests, tags, headers, a log; and marks are read back."""

from revox.marking.errors import MarkError
from revox.marking.log import log_mark, sha256_of
from revox.marking.manifest import load_signer
from revox.marking.mark import Marked, how_marked, mark_bytes, mark_file, write_marked
from revox.marking.record import MarkRecord, new_record, stream_headers
from revox.marking.signer import Signer, can_sign, state_folder
from revox.marking.tags import stream_tags
from revox.marking.verify import Verification, verify_bytes, verify_file

__all__ = [
    "MarkError",
    "MarkRecord",
    "Marked",
    "Signer",
    "Verification",
    "can_sign",
    "how_marked",
    "load_signer",
    "log_mark",
    "mark_bytes",
    "mark_file",
    "new_record",
    "sha256_of",
    "state_folder",
    "stream_headers",
    "stream_tags",
    "verify_bytes",
    "verify_file",
    "write_marked",
]
