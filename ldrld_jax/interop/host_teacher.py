"""Teachers outside of JAX: a function of NumPy images, and a file of logits that somebody computed."""

import concurrent.futures
import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from ldrld_jax.errors import UserError, as_user_error, reason
from ldrld_jax.files import is_local
from ldrld_jax.interop.torch_files import read_tensors

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class HostTeacher:
    """A teacher in any framework: a function that runs on the host, a batch ahead of the train step.

    Attributes:
      function: `function(images)` returns logits `[n, C]`, or `[n, ..., C]` for data with several labels per example,
        as an array, a tensor of PyTorch, or whatever NumPy converts. Images are the augmented batch as the student
        sees it before normalisation: the source's dtype, uint8 for pixels, `[n, height, width, channels]`; padding is
        left out. It is called in one thread at a time.
      name: identifies the teacher in a logit store, so another teacher needs another name; also shown in a run's
        record.
      mean, std: if given, images are float32 and normalised with them: pixels (uint8) scaled to 0..1 and other inputs
        as they are, minus `mean`, divided by `std`, per channel.

    Example:
      >>> teacher = HostTeacher(lambda images: images.reshape(len(images), -1)[:, :10] / 255)
      >>> teacher(np.full((2, 8, 8, 1), 255, np.uint8)).shape
      (2, 10)
    """

    function: Callable[[np.ndarray], Any]
    name: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self):
        for name in ("mean", "std"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(map(float, np.ravel(values))))

    def __call__(
        self, images: np.ndarray, *, classes: int | None = None, label_shape: tuple[int, ...] = ()
    ) -> np.ndarray:
        """Returns logits `[n, *label_shape, classes]` float32.

        Args:
          images: `[n, ...]`, see `function`.
          classes: C; None for any.
          label_shape: of an example's labels.

        Raises:
          UserError: if the function returns another shape, or a number that is not finite.
        """
        if self.mean is not None or self.std is not None:
            mean, std = (np.asarray(values, np.float32) for values in (self.mean or (0.0,), self.std or (1.0,)))
            scale = 255 if images.dtype == np.uint8 else 1
            images = (images.astype(np.float32) / scale - mean) / std
        with as_user_error(
            f"the teacher {self.shown} fails on images {images.shape} {images.dtype}", "Mend its function."
        ):
            found = self.function(images)
        logits = self._array(found)
        lead = (len(images), *label_shape)
        if logits.shape[:-1] != lead or classes not in (None, logits.shape[-1]):
            wanted = ", ".join(map(str, (*lead, "C" if classes is None else classes)))
            of_classes = "" if classes is None else f" of {classes} classes"
            raise UserError(
                f"the teacher {self.shown} returns {logits.shape} for {len(images)} images{of_classes}, and must "
                f"return logits [{wanted}]."
            )
        if not np.isfinite(logits).all():
            raise UserError(f"a logit of the teacher {self.shown} is not finite. Look at its weights and its images.")
        return logits

    def _array(self, logits: Any) -> np.ndarray:
        """Converts logits to NumPy's float32: also a tensor of PyTorch with a gradient, on a GPU or in bfloat16."""
        try:
            if hasattr(logits, "detach"):
                logits = logits.detach().float().cpu().numpy()
            return np.asarray(logits, np.float32)
        except Exception as error:  # of NumPy, or of the library whose array it is
            raise UserError(
                f"the teacher {self.shown} returns {type(logits).__name__}, which NumPy cannot convert "
                f"({reason(error)}). Return logits as an array."
            ) from error

    @property
    def shown(self) -> str:
        """The name in messages."""
        name = str(self.name or getattr(self.function, "__name__", type(self.function).__name__))
        return "function" if name == "<lambda>" else name

    def of_batch(self, batch: Batch, *, classes: int, views: int = 1, label_shape: tuple[int, ...] = ()) -> np.ndarray:
        """Returns the logits of a batch, `[rows, *label_shape, C]`, 0 for padding; of several `[rows, views, ...]`."""
        images = batch["image"]
        lead = images.shape[: 2 if views > 1 else 1]
        logits = np.zeros((*lead, *label_shape, classes), np.float32)
        counted = batch["mask"] if "mask" in batch else np.ones(len(images), bool)
        kept = np.any(counted, axis=tuple(range(1, counted.ndim)))
        if kept.any():
            flat = images[kept].reshape(-1, *images.shape[len(lead) :])
            logits[kept] = self(flat, classes=classes, label_shape=label_shape).reshape(-1, *logits.shape[1:])
        return logits

    def beside(self, batches: Iterable[Batch], **shape: Any) -> Iterator[Batch]:
        """Yields the batches with their `teacher_logits`, see `of_batch`, computed by a thread one batch ahead."""
        with concurrent.futures.ThreadPoolExecutor(1, "teacher") as thread:
            ahead = None
            for batch in batches:
                following = batch, thread.submit(self.of_batch, batch, **shape)
                if ahead is not None:
                    yield {**ahead[0], "teacher_logits": ahead[1].result()}
                ahead = following
            if ahead is not None:
                yield {**ahead[0], "teacher_logits": ahead[1].result()}


@dataclasses.dataclass(frozen=True)
class LogitsFile:
    """Logits that were computed elsewhere, in the order of the training images; it reads like a logit store.

    Attributes:
      logits: `[views, n, C]`, or `[views, n, ..., C]` for several labels per example; epoch e takes view e % views.
      path: of the file, for messages.
    """

    logits: Any
    path: str

    @classmethod
    def open(cls, path: str, *, images: int, classes: int, label_shape: tuple[int, ...] = ()) -> "LogitsFile":
        """Opens a file of logits `[n, *label_shape, C]`, or of `[views, n, *label_shape, C]`.

        Args:
          path: .npy, .safetensors with one array, or a zarr folder.
          images: n.
          classes: C.
          label_shape: see `data.source.Source`.

        Raises:
          UserError: if it cannot be read, or is of other images or classes.
        """
        logits, wanted = _read(path), (images, *label_shape, classes)
        views = logits[None] if logits.ndim == len(wanted) else logits
        held, shown = f"{logits.dtype} {list(logits.shape)}", ", ".join(map(str, wanted))
        if views.shape[1:] != wanted:
            raise UserError(
                f"{path} holds {held}, and the training images need logits [{shown}] or [views, {shown}], in the order "
                "of the dataset. Compute them for these images."
            )
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise UserError(f"{path} holds {held}, and logits are floating-point numbers. Save them as float32.")
        return cls(views, path)

    @property
    def views(self) -> int:
        return len(self.logits)

    def __contains__(self, epoch: int) -> bool:
        return True

    def read(self, epoch: int) -> np.ndarray:
        """Returns the logits `[n, *label_shape, C]` float32 of an epoch.

        Raises:
          UserError: if one is not finite.
        """
        logits = np.asarray(self.logits[epoch % self.views], np.float32)
        if not np.isfinite(logits).all():
            raise UserError(
                f"{self.path} holds logits that are not finite, in view {epoch % self.views}. Compute them again."
            )
        return logits


def _read(path: str) -> Any:
    try:
        if path.rstrip("/").endswith(".zarr"):
            import tensorstore

            driver = "zarr3" if (epath.Path(path) / "zarr.json").exists() else "zarr"
            spec = {"driver": driver, "kvstore": {"driver": "file", "path": path} if is_local(path) else path}
            return tensorstore.open(spec, open=True, read=True).result().read().result()
        if path.endswith(".safetensors"):
            arrays = [*read_tensors(path, "").values()]
            if len(arrays) != 1:
                raise ValueError(f"it holds {len(arrays)} arrays; save one")
            return arrays[0]
        if is_local(path):
            logits = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            logits = np.load(io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False)
        if not isinstance(logits, np.ndarray):
            logits.close()
            raise ValueError("it holds several arrays; save one as .npy")
        return logits.view(jnp.bfloat16) if logits.dtype == np.dtype("V2") else logits  # as NumPy saves bfloat16
    except UserError:
        raise
    except Exception as error:  # of NumPy, tensorstore or safetensors, which have errors of their own
        raise UserError(f"{path} cannot be read as a file of logits: {reason(error)}.") from error
