"""Sweeps, many runs of one config: `python -m ldrld_jax.sweep experiments/methods.py --workdir runs/methods`.

A sweep file is executed as Python, like a config, and defines the runs:

    def get_sweep():
        return {
            "config": "configs/cifar100.py",
            "overrides": {"epochs": 100},
            "runs": [{"method": "kd"}, {"method": "ldrld", "loss.ldrld.depth": 5}],
            "grid": {"seed": [0, 1, 2]},
        }

Every entry of `runs` is combined with every point of `grid`, and `overrides` apply to all runs; all three are
optional. Each run is a separate process with the workdir `WORKDIR/key=value,...`. Runs that train the same teacher
share it in `WORKDIR/teachers`, and runs whose stored logits agree share a logit store. Repeating the command runs
what is missing; several processes, shards or hosts that see the folder may do so at the same time.
"""
