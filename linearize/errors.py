"""The one exception that reaches a user, and help with misspelt names."""

from collections.abc import Iterable
from difflib import get_close_matches


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
