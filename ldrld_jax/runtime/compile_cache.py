"""Keeps compiled programs on disk, so that the second start of a run need not compile them again."""

import logging
import tempfile

import jax
from etils import epath

from ldrld_jax.errors import UserError, reason
from ldrld_jax.files import check_remote, expand_home, is_local

logger = logging.getLogger("ldrld_jax")


def keep_compiled(folder: str) -> None:
    """Caches programs that take more than a second to compile in `folder`, and reuses those already there.

    JAX identifies a program by its code, its options, the device and the version of jaxlib. A cache that the user
    has configured for JAX itself, for example with JAX_COMPILATION_CACHE_DIR, takes precedence.

    Args:
      folder: created if missing; "" caches nothing. If it cannot be written, a warning is logged.
    """
    if not folder or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
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
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
