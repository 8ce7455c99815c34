"""Many runs of one config: `python -m ldrld_jax.sweep experiments/methods.py --workdir runs/methods`.

A sweep file is Python that is executed, as a config is, and says which runs there are:

    def get_sweep():
        return {
            "config": "configs/cifar100.py",
            "overrides": {"epochs": 100},
            "runs": [{"method": "kd"}, {"method": "ldrld", "loss.ldrld.depth": 5}],
            "grid": {"seed": [0, 1, 2]},
        }

Every entry of `runs` is combined with every combination of `grid`, and `overrides` are all runs';
each may be left out. Each run is a process of its own with the workdir `WORKDIR/key=value,...`; runs that train the
same teacher share it in `WORKDIR/teachers`, and runs that one logit store fits share that. The same command again
runs what is missing, in as many processes, shards or hosts that see the folder as are started.
"""
