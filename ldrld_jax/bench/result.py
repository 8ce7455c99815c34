"""The result of a benchmark and its table."""

import dataclasses

PARTS = {
    "step": "the whole train step, its batch already on the device",
    "teacher": "the teacher's forward pass alone",
    "student": "a step of plain training: the student without teacher and methods",
    "loss": "all terms of the loss and their gradient, of logits alone",
    "input": "a batch from the loader, nothing else running",
    "host": "the call that dispatches, until it returns",
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """The measurements of one benchmark.

    Attributes:
      title: the benchmarked config and devices.
      compile_seconds: time to trace and compile the train step.
      run_seconds: time of a step of the real loop, including input, dispatch and metrics.
      batch_size: examples per step.
      part_seconds: time of each of `PARTS`, measured alone; they need not add up to a step.
      flops: floating point operations per step, over all devices; None if XLA does not report them.
      peak: peak FLOP/s of all devices together; None if unknown.
      program_bytes: bytes that the step holds on one device, by the compiler; None if it does not report them.
      peak_bytes: the most bytes in use on one device; None if the runtime does not report them.
    """

    title: str
    compile_seconds: float
    run_seconds: float
    batch_size: int
    part_seconds: dict[str, float]
    flops: float | None
    peak: float | None
    program_bytes: int | None
    peak_bytes: int | None

    @property
    def examples_per_second(self) -> float:
        return self.batch_size / self.run_seconds

    @property
    def shares(self) -> dict[str, float]:
        """The time of each part in percent of a step of the real loop, at most 100."""
        return {name: min(100.0, 100 * seconds / self.run_seconds) for name, seconds in self.part_seconds.items()}

    @property
    def peak_share(self) -> float | None:
        """Achieved FLOP/s in percent of the devices' peak (MFU); None if unknown."""
        return None if self.flops is None or self.peak is None else 100 * self.flops / self.run_seconds / self.peak

    def __str__(self) -> str:
        rows = [
            ("compile", f"{self.compile_seconds:.1f} s", "the train step"),
            ("run", f"{1e3 * self.run_seconds:.2f} ms", "a step of the real loop"),
            ("", f"{self.examples_per_second:.0f}", "examples/s"),
        ]
        for name, seconds in self.part_seconds.items():
            rows.append((name, f"{1e3 * seconds:.2f} ms", f"{self.shares[name]:3.0f} %  {PARTS[name]}"))
        if self.flops is not None:
            of_peak = "the peak of this device is not known"
            if self.peak_share is not None:
                of_peak = f"{self.peak_share:.1f} % of the peak"
            rows.append(("FLOPs", f"{self.flops / 1e9:.2f} G", "a step"))
            rows.append(("", f"{self.flops / self.run_seconds / 1e9:.1f} G/s", of_peak))
        for name, size, how in (
            ("memory", self.program_bytes, "a device, the train step by the compiler"),
            ("", self.peak_bytes, "a device, the most in use"),
        ):
            if size is not None:
                rows.append((name, f"{size / 2**20:.1f} MiB", how))
        return "\n".join([self.title, *(f"{name:8}{value:>14}  {how}" for name, value, how in rows)])
