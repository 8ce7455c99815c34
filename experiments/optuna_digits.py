"""Searches LDRLD's alpha, beta, temperature and depth on the digits by Optuna, with pruning after the first epochs.

pip install 'ldrld_jax[optuna]'
python experiments/optuna_digits.py --trials 30 --workdir runs/optuna

A fifth of the training images is held out to judge the trials, so that the test images stay unseen. One teacher serves
all of them. The same command goes on until there are as many trials as it names.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import ldrld_jax
from ldrld_jax import config as config_lib
from ldrld_jax.errors import UserError, needs


def search(trials: int, workdir: pathlib.Path, overrides: Sequence[str] = ()) -> Any:
    """Returns the study in `workdir` once it has `trials` finished trials, each a run in `workdir/trial-NUMBER`.

    Raises:
      UserError: if no trial has run to its end, or a run cannot start.
    """
    with needs("the search", "optuna"):
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    workdir.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="ldrld",
        storage=JournalStorage(JournalFileBackend(str(workdir / "optuna.log"))),
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),  # from the third epoch on
    )

    def top1_of(trial: optuna.Trial) -> float:
        drawn = {
            "alpha": trial.suggest_float("alpha", 1.0, 30.0, log=True),
            "beta": trial.suggest_float("beta", 1.0, 30.0, log=True),
            "temperature": trial.suggest_float("temperature", 1.0, 8.0),
            "depth": trial.suggest_int("depth", 2, 10),
        }
        keys = ["data.held_out=.2", f"teacher.workdir={workdir / 'teacher'}", *overrides]
        keys += [f"loss.ldrld.{name}={value}" for name, value in drawn.items()]

        def rate(step: int, values: Any, variables: Any) -> None:
            trial.report(values["top1"], int(values["epoch"]))
            if trial.should_prune():
                raise optuna.TrialPruned

        run = ldrld_jax.Trainer.from_config(
            config_lib.load("configs/digits.py", keys),
            workdir / f"trial-{trial.number}",
            callbacks=[ldrld_jax.Callback(after_evaluation=rate)],
        )
        return run.fit().summary["last_top1"]

    ended = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED  # one that failed is made up for
    finished = sum(trial.state in ended for trial in study.trials)
    study.optimize(top1_of, n_trials=max(trials - finished, 0))
    if not study.get_trials(deepcopy=False, states=ended[:1]):
        raise UserError(f"no trial in {workdir} has run to its end. Name more by --trials, or another --workdir.")
    return study


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30, help="number of trials in all")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/optuna"), help="keep the study here")
    args = parser.parse_args(argv)
    try:
        best = search(args.trials, args.workdir).best_trial
    except UserError as error:  # such as an extra that is missing: one line
        parser.exit(2, f"{error}\n")
    print(f"best top-1 {best.value:.2f} % on the held-out images, in trial {best.number}: {best.params}")


if __name__ == "__main__":
    main()
