"""Formats file-system errors as one line.

The line names the setting, the path, the cause and the next step.
"""

from __future__ import annotations

import errno
import os


def of_folder(setting: str, path: object, error: OSError, *, user: str = "the service's user") -> str:
    """Return a line for a folder that cannot be created or written to.

    The line is the same for each repetition of an error, so it does not name the file that was being written.

    :param user: a description of this process's user.
    """
    cause, step = _of_folder(error, f"{user} (ID {os.geteuid()})")
    return f"{setting}: {path}: {cause}; {step}"


def _of_folder(error: OSError, user: str) -> tuple[str, str]:
    match error.errno:
        case errno.EEXIST | errno.ENOTDIR:
            return "it, or a folder above it, is a file and not a folder", "remove that file, or name another folder"
        case errno.EACCES | errno.EPERM:
            return reason(error), f"give {user} the right to write there, or name another folder"
        case errno.EROFS:
            return reason(error), "mount a file system there that can be written to, or name another folder"
        case errno.ENOSPC | errno.EDQUOT:
            return reason(error), "free some space, or name a folder on another file system"
        case errno.EMFILE | errno.ENFILE:
            return reason(error), "raise the limit of open files"
        case errno.ENAMETOOLONG | errno.ELOOP:
            return reason(error), "name another folder"
        case errno.EISDIR:
            return "a folder in it has the name of a file that is to be written", "remove that, or name another folder"
        case errno.ENOENT:
            return reason(error), "make the folder, or name another one"
        case _:
            return reason(error), "check the disk and its file system, or name another folder"


def of_socket(path: str, error: OSError) -> str:
    """Return the cause and the next step for a unix socket that cannot be created."""
    steps = {
        errno.EADDRINUSE: "end the process that uses it, remove the file if there is no such process, or set another",
        errno.ENOENT: f"make the folder {os.path.dirname(path) or '.'}, or set another",
        errno.ENOTDIR: f"{os.path.dirname(path)} is not a folder; set another",
        errno.EACCES: (
            f"give the service's user (ID {os.geteuid()}) the right to write to {os.path.dirname(path) or '.'}, or set "
            "another"
        ),
        errno.EROFS: "set a path on a file system that can be written to",
    }
    return f"{reason(error)}; {steps.get(error.errno or 0, 'set another')}"


def of_tcp(error: OSError) -> str:
    """Return the cause and the next step for a TCP port that cannot be opened."""
    steps = {
        errno.EADDRINUSE: "end what uses it, or set another",
        errno.EACCES: "set a port from 1024 on, or give the service the capability CAP_NET_BIND_SERVICE",
        errno.EADDRNOTAVAIL: "set an address that this machine has",
    }
    return f"{reason(error)}; {steps.get(error.errno or 0, 'set another')}"


def reason(error: OSError) -> str:
    """Return the system's description of an error, without a path."""
    return (error.strerror or str(error) or type(error).__name__).lower()
