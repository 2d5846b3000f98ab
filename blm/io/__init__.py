"""Files and folders on disk: written atomically, and never over files of another program.

Use `write_json` or `replacing` to write a file, `new_folder` to replace a folder, `remove_own` to
remove one, and `lock_folder` to keep a second process out of a run folder.
"""

from blm.io.files import (
    RESTORE,
    DamagedError,
    PointerError,
    abandoned_paths,
    read_json,
    read_json_lines,
    reading,
    replacing,
    require_no_pointer,
    sha256_file,
    write_array,
    write_bytes,
    write_json,
    write_text,
    writing,
)
from blm.io.folders import MARK, files_below, new_folder, recover_folder, remove_own, work_folder
from blm.io.locks import lock_exclusively, lock_folder

__all__ = [
    "MARK",
    "RESTORE",
    "DamagedError",
    "PointerError",
    "abandoned_paths",
    "files_below",
    "lock_exclusively",
    "lock_folder",
    "new_folder",
    "read_json",
    "read_json_lines",
    "reading",
    "recover_folder",
    "remove_own",
    "replacing",
    "require_no_pointer",
    "sha256_file",
    "work_folder",
    "write_array",
    "write_bytes",
    "write_json",
    "write_text",
    "writing",
]
