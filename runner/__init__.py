"""What makes runs happen: parameters, studies, run folders, data, models, engines, the sweep.

`python -m runner STUDY` does a whole study. `runner` imports `lib`, never the reverse.

ROOT is the project. WORK is where `data/`, `models/` and `outputs/` are: the project too, unless
the environment variable GRPO_NOISE_WORK names another folder (a scratch disk of a cluster, say).
"""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = Path(os.environ.get("GRPO_NOISE_WORK", ROOT)).expanduser().resolve()
OUTPUTS = WORK / "outputs"
BUILT_HERE = ("tiny", "smol-warm")  # base policies that 01b_warm_start makes
