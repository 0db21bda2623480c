"""Everything spoken is marked as synthetic: C2PA manifests, tags, headers, a log; and read back."""

from revox.marking.errors import MarkError
from revox.marking.log import log_mark, sha256_of
from revox.marking.mark import Marked, how_marked, mark_bytes, mark_file, write_data, write_marked
from revox.marking.record import MarkRecord, new_record, stream_headers
from revox.marking.signer import Signer, can_sign, load_signer, state_folder
from revox.marking.tags import stream_tags
from revox.marking.verify import Verdict, verify_bytes, verify_file

__all__ = [
    "MarkError",
    "MarkRecord",
    "Marked",
    "Signer",
    "Verdict",
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
    "write_data",
    "write_marked",
]
