"""Plans which runs are trained, in which order and with which settings, from their progress and speed."""

import dataclasses
from collections.abc import Mapping, Sequence

PAIRS = ("resnet56-resnet20", "resnet32x4-resnet8x4", "wrn_40_2-wrn_16_2")
METHODS = ("ldrld", "kd", "dkd", "ce")
SEEDS = (0, 1, 2)
TEACHER = "teacher"

# Layers and millions of multiply-adds per image in a forward pass, to estimate a step until it is measured.
_SIZES = {
    "resnet56": (56, 126),
    "resnet20": (20, 41),
    "resnet32x4": (32, 1083),
    "resnet8x4": (8, 177),
    "wrn_40_2": (40, 328),
    "wrn_16_2": (16, 101),
}
_SECONDS_A_LAYER, _FLOPS = 8e-6, 1e14  # one or two short kernels; TF32 in practice on a large GPU
_BATCH = 64

GRAPHS = "--xla_gpu_enable_command_buffer=+CONVOLUTION,+CONDITIONAL,+WHILE"  # whole loops as CUDA graphs
FLAGS = ("", GRAPHS)
TOGETHER = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run: a pair's student with a method and a seed, or a teacher, shared by all pairs that name it."""

    pair: str
    method: str
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        if self.method == TEACHER:
            return f"{TEACHER}={self.networks[0]}"
        return f"pair={self.pair},method={self.method},seed={self.seed}"

    @property
    def networks(self) -> tuple[str, str]:
        teacher, _, student = self.pair.partition("-")
        return teacher, student

    @property
    def kind(self) -> str:
        """The key that the run's speed depends on; the methods of a pair hardly differ in speed."""
        teacher, student = self.networks
        return {TEACHER: teacher, "ce": student}.get(self.method, self.pair)

    @property
    def teacher(self) -> "Job":
        return Job(self.pair, TEACHER)


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of the runs.

    Attributes:
      steps: steps of a whole run.
      done: saved steps, by job name.
      finished: names of the finished jobs.
      seconds: measured seconds per step, by kind.
    """

    steps: int
    done: Mapping[str, int]
    finished: frozenset[str]
    seconds: Mapping[str, float]

    def remaining(self, job: Job) -> float:
        """Returns the seconds that a job still has to run, without its teacher."""
        if job.name in self.finished:
            return 0.0
        return max(1, self.steps - self.done.get(job.name, 0)) * self.seconds.get(job.kind, prior(job))


def prior(job: Job) -> float:
    """Estimates the seconds per step from the networks' sizes; a backward pass costs two forward passes.

    Example:
      >>> round(1e3 * prior(Job("resnet56-resnet20", "teacher")), 2)
      1.83
    """
    teacher, student = (_SIZES.get(network, (20, 41)) for network in job.networks)
    passes = {TEACHER: [(3, teacher)], "ce": [(3, student)]}.get(job.method, [(3, student), (1, teacher)])
    layers = sum(times * size[0] for times, size in passes)
    flops = sum(times * 2e6 * size[1] * _BATCH for times, size in passes)
    return layers * _SECONDS_A_LAYER + flops / _FLOPS


def order(progress: Progress, pairs: Sequence[str] = PAIRS, seeds: Sequence[int] = SEEDS) -> list[Job]:
    """Returns the unfinished jobs: seed by seed over all pairs, within a seed the soonest complete comparison first."""

    def comparison(pair: str, seed: int) -> list[Job]:
        return [Job(pair, TEACHER), *(Job(pair, method, seed) for method in METHODS)]

    jobs: dict[str, Job] = {}
    for seed in seeds:
        all_of_them = [comparison(pair, seed) for pair in pairs]
        for one in sorted(all_of_them, key=lambda one: sum(map(progress.remaining, one))):
            jobs |= {job.name: job for job in one if job.name not in jobs}
    return [job for name, job in jobs.items() if name not in progress.finished]


def runnable(jobs: Sequence[Job], progress: Progress, count: int) -> list[Job]:
    """Returns the first `count` jobs whose teacher is finished or that need none."""
    free = (TEACHER, "ce")
    return [job for job in jobs if job.method in free or job.teacher.name in progress.finished][:count]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Way to run the jobs: XLA flags, and the number of runs that share the device."""

    flags: str
    together: int


PLAIN = Setting("", 1)


def next_setting(rates: Mapping[Setting, float], together: Sequence[int] = TOGETHER) -> tuple[Setting, bool]:
    """Returns the setting to use next, and True if it has not been measured yet.

    Args:
      rates: measured settings and the work per second of all runs sharing the device; 0 for a failed setting.
      together: numbers of parallel runs to try, 1 first.
    """
    for flags in FLAGS:
        if Setting(flags, 1) not in rates:
            return Setting(flags, 1), True
    flags = max(FLAGS, key=lambda flags: rates[Setting(flags, 1)])
    for count in together:
        if Setting(flags, count) not in rates:
            return Setting(flags, count), True
        if rates[Setting(flags, count)] < rates[Setting(flags, 1)]:
            break  # more runs will not help if fewer did not
    return max(rates, key=lambda setting: rates[setting]), False
