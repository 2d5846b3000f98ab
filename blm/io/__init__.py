"""Files and folders on disk: written whole or not at all, and never over what others wrote.

The one way to write a file (`write_json`, `replacing`), to swap a folder in (`new_folder`), to remove one
(`remove_own`), and to keep a second process out of a run folder (`hold`).
"""

from blm.io.files import (
    RESTORE,
    DamagedError,
    PointerError,
    leftovers,
    read_json,
    reading,
    replacing,
    require_no_pointer,
    sha256_file,
    write_bytes,
    write_json,
    write_text,
    writing,
)
from blm.io.folders import MARK, files_below, hold, new_folder, remove_own, settled, work_folder

__all__ = [
    "MARK",
    "RESTORE",
    "DamagedError",
    "PointerError",
    "files_below",
    "hold",
    "leftovers",
    "new_folder",
    "read_json",
    "reading",
    "remove_own",
    "replacing",
    "require_no_pointer",
    "settled",
    "sha256_file",
    "work_folder",
    "write_bytes",
    "write_json",
    "write_text",
    "writing",
]
