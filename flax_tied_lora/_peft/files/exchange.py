"""Two paths that change places in one step, where the system can do that.

No reader, and no crash, sees one of them without the other. Linux and macOS have a call for it,
which Python does not wrap; file systems may refuse it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_HERE = -100  # AT_FDCWD: paths as they are
_SWAP = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
# What a kernel or a file system without the call answers.
_UNABLE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM, errno.EBUSY}


def exchange(first: Path, second: Path) -> bool:
    """Exchanges two paths of one file system, and returns whether it could.

    Raises:
      OSError: the system can do it, and has failed.
    """
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    if hasattr(library, "renameat2"):
        status = library.renameat2(_HERE, names[0], _HERE, names[1], _SWAP)
    elif hasattr(library, "renamex_np"):
        status = library.renamex_np(*names, _SWAP)
    else:
        return False
    if status == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNABLE:
        return False
    raise OSError(code, os.strerror(code), str(second))
