"""Errors that the user can fix: one line each, shown without a traceback by the command line."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Invalid input; the message says what was given, what is allowed and what to do."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Returns the error for a name that is not in a table, with the nearest known name.

    Example:
      >>> str(unknown("model", "resnet8x5", ["resnet8x4", "resnet20"]))
      "there is no model 'resnet8x5'. Did you mean 'resnet8x4'? Known: resnet8x4, resnet20."
    """
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return UserError(f"there is no {kind} {name!r}.{hint} Known: {', '.join(known)}.")
