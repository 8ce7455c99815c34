"""Compiled programs are kept on disk: the second start of a run does not compile them again."""

import logging
import tempfile

import jax
from etils import epath

from ldrld_jax.files import expand_home

logger = logging.getLogger("ldrld_jax")


def keep_compiled(folder: str) -> None:
    """Keeps what this process compiles for more than a second in `folder`, and takes from there what is known.

    JAX finds a program again by its code, its options, the device and the version of jaxlib. What the
    user has chosen for JAX itself, JAX_COMPILATION_CACHE_DIR for example, stays.

    Args:
      folder: created if it is missing; "" keeps nothing. One that cannot be written is a warning.
    """
    if not folder or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    path = epath.Path(expand_home(folder))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)  # what lies there is run: ours alone
        if "://" not in folder:
            tempfile.TemporaryFile(dir=path).close()  # a folder may exist and be closed to us
    except OSError as error:
        logger.warning("compiled programs are not kept, %s: %s. Set compile_cache.", error.strerror or error, path)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
