"""A backend of epath that keeps gs:// in a local folder, with the habits of a bucket that a disk has not."""

import os
import pathlib

from etils.epath import backend

_DISK = backend.os_backend


class ObjectStore(backend.Backend):
    """Backend in which a folder is there as long as a file is in it, and which knows no permissions.

    Args:
      root: holds a folder for each bucket.
    """

    def __init__(self, root: pathlib.Path):
        self._root = root

    def local(self, path) -> pathlib.Path:
        """Returns the place of a gs:// path; any other one was made from a gs:// path by mistake."""
        place = os.fspath(path)
        assert place.startswith("gs://"), place
        return self._root / place.removeprefix("gs://")

    def open(self, path, mode):
        if "r" not in mode:
            self.local(path).parent.mkdir(parents=True, exist_ok=True)
        return _DISK.open(self.local(path), mode)

    def exists(self, path):
        return self.local(path).is_file() or self.isdir(path)

    def isdir(self, path):
        return any(file.is_file() for file in self.local(path).rglob("*"))

    def listdir(self, path):
        return [name for name in _DISK.listdir(self.local(path)) if self.exists(f"{path}/{name}")]

    def glob(self, path):
        return [f"gs://{found.relative_to(self._root)}" for found in self._root.glob(path.removeprefix("gs://"))]

    def walk(self, top, *, top_down=True, on_error=None):
        for folder, folders, files in _DISK.walk(self.local(top), top_down=top_down, on_error=on_error):
            # As epath's own for a bucket yields them, without gs://.
            yield os.path.relpath(folder, self._root), folders, files

    def makedirs(self, path, *, exist_ok=False, mode=None):
        self.mkdir(path, exist_ok=exist_ok, mode=mode)

    def mkdir(self, path, *, exist_ok=False, mode=None):
        if mode not in (None, 0o777):
            backend.fsspec_backend.mkdir(path, mode=mode)  # epath's own for a bucket, which refuses a mode
        if not exist_ok and self.exists(path):
            raise FileExistsError(path)

    def rmtree(self, path):
        _DISK.rmtree(self.local(path))

    def remove(self, path):
        _DISK.remove(self.local(path))

    def rename(self, path, dst):
        _DISK.rename(self.local(path), self.local(dst))

    def replace(self, path, dst):
        _DISK.replace(self.local(path), self.local(dst))

    def copy(self, path, dst, overwrite):
        _DISK.copy(self.local(path), self.local(dst), overwrite)

    def stat(self, path):
        return _DISK.stat(self.local(path))
