"""Errors that the user can fix: one line each, shown without a traceback by the command line."""

import contextlib
import difflib
import logging
from collections.abc import Iterable, Iterator, Sequence

_MOST_LISTED = 100  # names of a table; TFDS knows more than a thousand datasets


class UserError(ValueError):
    """Invalid input; the message says what was given, what is allowed and what to do."""


class NonFiniteError(RuntimeError):
    """A number that must be finite is not; the message names it and the step, or the file."""

    exit_code = 1


def one_line(error: Exception) -> str:
    """Returns an error of a user's code as one line with its type; JAX explains its own in further paragraphs.

    Example:
      >>> one_line(TypeError("dot_general requires equal sizes.\\n\\nSee the documentation."))
      'TypeError: dot_general requires equal sizes.'
      >>> one_line(ValueError())
      'ValueError.'
    """
    text = " ".join(str(error).partition("\n\n")[0].split()).rstrip(".")
    return f"{type(error).__name__}{f': {text}' if text else ''}."


def reason(error: BaseException) -> str:
    """Returns an error's text on one line without its full stop, or the name of its type if it has no text.

    Example:
      >>> reason(OSError("the disk  is full.")), reason(MemoryError())
      ('the disk is full', 'MemoryError')
    """
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text without its full stop, or the name of its type if it has no text.

    Example:
      >>> first_line(OSError("no connection.\\nTry again.")), first_line(MemoryError())
      ('no connection', 'MemoryError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")


def os_error(error: OSError) -> str:
    """Returns an error of the operating system as text, with the name of its file."""
    return f"{error.strerror or error}: {error.filename}" if error.filename else str(error)


def listed(names: Sequence[str], most: int) -> str:
    """Joins names by commas; of more than `most`, the first ones and the number of the others.

    Example:
      >>> listed(["a", "b", "c"], 3), listed(["a", "b", "c"], 2)
      ('a, b, c', 'a, b and 1 more')
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def given_in_python(what: str) -> UserError:
    """Returns the error for a part of a run that was given as an object, of which a config has only the name."""
    return UserError(
        f"{what} was given as a Python object and cannot be made from its name. Pass it to ldrld_jax.Trainer again."
    )


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Returns the error for a name that is not in a table, with the nearest known name.

    Example:
      >>> str(unknown("model", "resnet8x5", ["resnet8x4", "resnet20"]))
      "there is no model 'resnet8x5'. Did you mean 'resnet8x4'? Known: resnet8x4, resnet20."
    """
    known = list(known)
    nearest = _nearest(name, known)
    hint = f" Did you mean {nearest!r}?" if nearest is not None else ""
    return UserError(f"there is no {kind} {name!r}.{hint} Known: {listed(known, _MOST_LISTED)}.")


@contextlib.contextmanager
def needs(purpose: str, extra: str) -> Iterator[None]:
    """Raises a UserError that names the extra if an import in the block finds no such package.

    Args:
      purpose: the beginning of the line, such as "reading net.pth".
      extra: of this package.

    Example:
      >>> with needs("reading net.abc", "abc"):
      ...     import a_package_that_is_not_there
      Traceback (most recent call last):
      ldrld_jax.errors.UserError: reading net.abc needs a_package_that_is_not_there: pip install 'ldrld_jax[abc]'.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{purpose} needs {error.name}: pip install 'ldrld_jax[{extra}]'.") from None


@contextlib.contextmanager
def as_user_error(what: str, then: str = "") -> Iterator[None]:
    """Raises any error of a user's code in the block as a `UserError`, except one that is already.

    Args:
      what: the beginning of the line, what fails.
      then: its end, what to do.

    Example:
      >>> with as_user_error("config a.py failed", "Correct the file."):
      ...     1 / 0
      Traceback (most recent call last):
      ldrld_jax.errors.UserError: config a.py failed: ZeroDivisionError: division by zero. Correct the file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {one_line(error)} {then}".rstrip()) from error


@contextlib.contextmanager
def silent(logger_name: str) -> Iterator[None]:
    """Drops what a library logs in the block, for one that logs errors which it raises as well."""
    log = logging.getLogger(logger_name)
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


def _nearest(name: str, known: list[str]) -> str | None:
    """Returns the known name that is nearest to another one.

    Example:
      >>> _nearest("KD", ["kd", "dkd"]), _nearest("optim.lr", ["optim.learning_rate", "optim.clip_norm"])
      ('kd', 'optim.learning_rate')
      >>> _nearest("resnet18", ["resnet8", "imagenet_resnet18"])
      'imagenet_resnet18'
    """
    lower = name.lower()
    same = [other for other in known if other.lower() == lower or _initials(other.lower()) == lower]
    whole_words = [other for other in known if lower in other.lower().split("_")]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return next(iter([*same, *whole_words, *close]), None)


def _initials(name: str) -> str:
    """Returns a dotted name with the initials of its last part: "optim.lr" for "optim.learning_rate"."""
    block, dot, last = name.rpartition(".")
    return block + dot + "".join(word[0] for word in last.split("_") if word)
