"""A causal language model of characters, distilled from one of five times its size: texts in place of images.

python -m ldrld_jax.main --config configs/tokens.py --workdir runs/tokens
python -m ldrld_jax.main --config configs/tokens.py --workdir runs/tokens-ce --config.method=ce
python -m ldrld_jax.main --config configs/tokens.py --workdir runs/tokens-top --config.method=topk_tail \
    --config.loss.topk_tail.top_k=8 --config.loss.topk_tail.beta=0.0 --config.teacher.workdir=runs/tokens/teacher

published  none: the texts ship with Python (pydoc_data), so everything can be tried with them
ours       kd 56.41, ce 55.94, topk_tail 56.65, and 62.22 for the teacher: top-1 in percent of the next characters,
           seed 0, Python 3.11, jax 0.10.2 on a CPU; cross-entropy 1.589, 1.610, 1.591 and 1.320 nats a character
time       3 minutes of CPU time for teacher and student, on a busy machine
Another version of Python has other texts of about the same length. The model and the data are named by
`module:function`, like a user's own, so `--mode eval` and `--mode export` also need
`--config.student.model=ldrld_jax.examples.tokens:small --config.data.name=ldrld_jax.examples.tokens:texts`.
"""

from ml_collections import ConfigDict

MODULE = "ldrld_jax.examples.tokens"


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.epochs = 4
    config.batch_size = 16
    config.method = "kd"
    config.loss = ConfigDict({"kd": {"temperature": 1.0}})
    config.data = ConfigDict({"name": f"{MODULE}:texts"})
    config.student = ConfigDict({"model": f"{MODULE}:small"})
    config.teacher = ConfigDict({"model": f"{MODULE}:large", "epochs": 4})
    config.optim = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 5e-3,
            "weight_decay": 0.01,
            "schedule": "cosine",
            "warmup": "linear",
            "warmup_epochs": 1,
        }
    )
    return config
