"""Which runs are trained, in which order and how, by what is done and how fast it went. No run is started here."""

import dataclasses
from collections.abc import Mapping, Sequence

PAIRS = ("resnet56-resnet20", "resnet32x4-resnet8x4", "wrn_40_2-wrn_16_2")
METHODS = ("ldrld", "kd", "dkd", "ce")
SEEDS = (0, 1, 2)
TEACHER = "teacher"

# Layers and millions of multiply-adds an image, forwards: what a step costs until it has been measured.
_SIZES = {
    "resnet56": (56, 126),
    "resnet20": (20, 41),
    "resnet32x4": (32, 1083),
    "resnet8x4": (8, 177),
    "wrn_40_2": (40, 328),
    "wrn_16_2": (16, 101),
}
_SECONDS_A_LAYER, _FLOPS = 8e-6, 1e14  # of a short kernel or two; of TF32 on a large GPU, in practice
_BATCH = 64

GRAPHS = "--xla_gpu_enable_command_buffer=+CONVOLUTION,+CONDITIONAL,+WHILE"  # whole loops as CUDA graphs
FLAGS = ("", GRAPHS)
TOGETHER = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Job:
    """A run: a pair's student by a method and a seed, or a teacher, which all pairs that name it share."""

    pair: str
    method: str
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of its folder."""
        if self.method == TEACHER:
            return f"{TEACHER}={self.networks[0]}"
        return f"pair={self.pair},method={self.method},seed={self.seed}"

    @property
    def networks(self) -> tuple[str, str]:
        teacher, _, student = self.pair.partition("-")
        return teacher, student

    @property
    def kind(self) -> str:
        """The key that its speed depends on: the methods of a pair hardly differ."""
        teacher, student = self.networks
        return {TEACHER: teacher, "ce": student}.get(self.method, self.pair)

    @property
    def teacher(self) -> "Job":
        return Job(self.pair, TEACHER)


@dataclasses.dataclass(frozen=True)
class Progress:
    """The state of the runs.

    Attributes:
      steps: of a whole run.
      done: steps that are saved, by the job's name.
      finished: the names of those that have ended.
      seconds: a step's, measured, by kind.
    """

    steps: int
    done: Mapping[str, int]
    finished: frozenset[str]
    seconds: Mapping[str, float]

    def remaining(self, job: Job) -> float:
        """Seconds until a job ends, of its own."""
        if job.name in self.finished:
            return 0.0
        return max(1, self.steps - self.done.get(job.name, 0)) * self.seconds.get(job.kind, prior(job))


def prior(job: Job) -> float:
    """Seconds a step by the networks' sizes; backward passes cost twice the forward ones.

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
    """The jobs that are left: one seed of every pair before the next, the comparison first that is soonest complete."""

    def comparison(pair: str, seed: int) -> list[Job]:
        return [Job(pair, TEACHER), *(Job(pair, method, seed) for method in METHODS)]

    jobs: dict[str, Job] = {}
    for seed in seeds:
        all_of_them = [comparison(pair, seed) for pair in pairs]
        for one in sorted(all_of_them, key=lambda one: sum(map(progress.remaining, one))):
            jobs |= {job.name: job for job in one if job.name not in jobs}
    return [job for name, job in jobs.items() if name not in progress.finished]


def runnable(jobs: Sequence[Job], progress: Progress, count: int) -> list[Job]:
    """The first `count` jobs whose teacher has ended, or that need none."""
    free = (TEACHER, "ce")
    return [job for job in jobs if job.method in free or job.teacher.name in progress.finished][:count]


@dataclasses.dataclass(frozen=True)
class Setting:
    """The way in which runs are run: XLA's flags, and how many share the device."""

    flags: str
    together: int


PLAIN = Setting("", 1)


def next_setting(rates: Mapping[Setting, float], together: Sequence[int] = TOGETHER) -> tuple[Setting, bool]:
    """The setting to run by next, and whether it has yet to be measured.

    Args:
      rates: of the settings measured: work a second, of all that shared the device; 0 for one that failed.
      together: the numbers of runs side by side to try, 1 first.
    """
    for flags in FLAGS:
        if Setting(flags, 1) not in rates:
            return Setting(flags, 1), True
    flags = max(FLAGS, key=lambda flags: rates[Setting(flags, 1)])
    for count in together:
        if Setting(flags, count) not in rates:
            return Setting(flags, count), True
        if rates[Setting(flags, count)] < rates[Setting(flags, 1)]:
            break  # more of them will not help where fewer did not
    return max(rates, key=lambda setting: rates[setting]), False
