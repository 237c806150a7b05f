"""Files that are written whole or not at all, and read with errors that name the file."""

from cvmk.deprecation import moved
from cvmk.files.locking import lock
from cvmk.files.pointers import followed, pointed, write_pointer
from cvmk.files.reading import explained, open_input, plain, read_bytes, read_json, read_text
from cvmk.files.writing import atomic, sync_folder, write_bytes, write_json, write_text

__all__ = [
    "atomic",
    "explained",
    "followed",
    "lock",
    "open_input",
    "plain",
    "pointed",
    "read_bytes",
    "read_json",
    "read_text",
    "sync_folder",
    "write_bytes",
    "write_json",
    "write_pointer",
    "write_text",
]

__getattr__ = moved(__name__, "cvmk.files", open_maybe_gzip="open_input")
