"""The comparison of runs, from the files they left: `python -m ldrld_jax.report DIR...`.

Importing it, finding runs and making the table load neither jax nor any other big library.
"""

from ldrld_jax.report.collect import FoundRun, Report, collect
from ldrld_jax.report.table import table

__all__ = ["FoundRun", "Report", "collect", "table"]
