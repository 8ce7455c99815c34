"""Keeps compiled programs on disk, so that the second start of a run need not compile them again."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from ldrld_jax.errors import UserError, reason
from ldrld_jax.files import check_remote, expand_home, is_local

logger = logging.getLogger("ldrld_jax")


_given: str | None = None  # the folder that JAX has from here; any other is the user's


@contextlib.contextmanager
def keep_compiled(folder: str) -> Iterator[None]:
    """Caches programs that take more than a second to compile inside the block in `folder`, and reuses those there.

    JAX identifies a program by its code, its options, the device and the version of jaxlib. A cache that the user
    has configured for JAX itself, for example with JAX_COMPILATION_CACHE_DIR, takes precedence. A run within a callback
    of another has its own.

    Args:
      folder: created if missing; "" caches nothing. If it cannot be written, a warning is logged.
    """
    before = _folder()
    if before and before != _given:
        yield
        return
    own = _opened(folder)
    _set(own)
    try:
        yield
    finally:
        if _folder() == own:  # else the user has set another one meanwhile
            _set(before)


def _folder() -> str | None:
    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]


def _set(folder: str | None) -> None:
    global _given
    _given = folder
    if folder != _folder():
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # JAX would keep the one that it has opened


def _opened(folder: str) -> str | None:
    """Returns the path of the folder, made if missing; None if `folder` is empty or cannot be written."""
    if not folder:
        return None
    path = epath.Path(expand_home(folder))
    try:
        check_remote(path)
        # Private, because cached programs are executed; a bucket has permissions of its own.
        path.mkdir(mode=0o700 if is_local(path) else None, parents=True, exist_ok=True)
        if is_local(path):
            tempfile.TemporaryFile(dir=path).close()  # an existing folder may not be writable
    except (OSError, UserError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        logger.warning("compiled programs are not kept, %s: %s. Set compile_cache.", why, path)
        return None
    return str(path)
