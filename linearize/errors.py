"""The one exception that reaches a user, and help with misspelt names."""

import errno
import os
import re
from collections.abc import Iterable
from difflib import get_close_matches

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_FILES = {*_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
_OF_FILES |= {errno.ELOOP, errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY, errno.EXDEV, errno.ENXIO, 116}
DISK_FULL = tuple(os.strerror(number) for number in _FULL)
"""Texts of `disk_error` that mean that there is no room."""


class InputError(ValueError):
    """The user asked for something that cannot be done.

    The text is one paragraph, *where: what was found; what is allowed; what to do*. The command line prints it to
    stderr and exits with code 2. Any other exception that reaches the user is a bug of this package. An
    ``except ValueError`` around calls of this package catches it too, so it needs ``except InputError: raise`` first.
    """


def suggest(name: str, options: Iterable[str]) -> str:
    """Name the options nearest to a misspelt name, then all of them.

    Args:
        name: what was typed.
        options: the names that exist.

    Returns:
        For example ``Did you mean 'gla'? Available: gla, softmax, window``.

    Example:
        >>> suggest("glaa", ["window", "gla"])
        "Did you mean 'gla'? Available: gla, window"
    """
    options = sorted(options)
    folded = {option.lower(): option for option in options}
    near = [folded[match] for match in get_close_matches(name.lower(), folded, n=3, cutoff=0.5)]
    guess = f"Did you mean {' or '.join(repr(option) for option in near)}? " if near else ""
    return f"{guess}Available: {', '.join(options) or 'none'}"


def disk_error(error: BaseException | None) -> str | None:
    """What the file system said, if an exception, or one that caused it, comes from there.

    Args:
        error: any exception; libraries in Rust and torch have their own for what the system says.

    Returns:
        For example ``No space left on device: /out/model.safetensors``; None if it is no such exception.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _OF_FILES:
            said = os.strerror(error.errno or 0)
            name = error.filename2 or error.filename  # of two, the one that was to be there
            return f"{said}: {name}" if name else said
        if not isinstance(error, OSError):
            if by_rust := re.search(r"\(os error (\d+)\)", str(error)):
                return os.strerror(int(by_rust[1]))
            if re.search(r"PytorchStreamWriter failed|inline_container.cc.*unexpected pos", str(error)):
                return f"{DISK_FULL[0]}, as it seems"
        error = error.__cause__
    return None
