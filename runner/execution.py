"""One execution of 02_train: who may write into the run's folder, and when the run is done."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from runner.checkpoints import step_of
from runner.engines import check_engine
from runner.parameters import Params
from runner.runs import begin, check_inputs, finish, hold, prove, status


class Run:
    """A run that is to be trained, gone on with, or only shown again.

        run = Run(params, In)
        if not run.finished:
            with run.training(policy_hash=..., data_hash=...):
                ...  # train, and leave adapter/, rewards.parquet and metrics.parquet

    DONE is written at the end of the block, if nothing in it failed and the log can be proven.
    """

    def __init__(self, params: Params, cells: list[str]):
        """Check what the run needs, and lock its folder unless it is done.

        cells: IPython's `In`, a list that grows with each executed cell. Those from the present
        one on make the run, if a kernel makes several.
        """
        self.params, self.folder, self.began = params, params.folder, time.monotonic()
        self.cells, self.first_cell = cells, max(0, len(cells) - 1)
        self.lock = None
        begun = status(self.folder)
        if begun != "done":
            check_engine(params.engine)  # before data and models are asked for
        check_inputs(params)
        if begun != "done":
            self.lock = hold(self.folder)
        self.finished = status(self.folder) == "done"  # perhaps by another process, just now
        self.engine = "transformers" if self.finished else params.engine  # then it is only shown

    def __str__(self) -> str:
        found = status(self.folder).replace("missing", "a new run")
        return f"{self.folder.name}: {found}"

    @contextmanager
    def training(self, **identity: str) -> Iterator["Run"]:
        """The block that trains the run; within it there are `record` and `checkpoint`.

        identity: policy_hash and data_hash, which must be those that the run began with.
        See `runs.begin` for what is refused and mended, and for record and checkpoint.
        """
        executed = self.cells[self.first_cell:]
        self.record, self.checkpoint = begin(self.folder, self.params, executed, **identity)
        try:
            yield self
            self._refuse_unproven_log()
            self.record["notebook_seconds"] = round(time.monotonic() - self.began, 1)
            finish(self.folder, self.record)
        finally:
            self.lock.close()  # another notebook may show the run while this kernel lives

    @property
    def resumed_from(self) -> int:
        """The step that this start goes on from."""
        return step_of(self.checkpoint) if self.checkpoint else 0

    def _refuse_unproven_log(self):
        rows, wrong = prove(self.folder)
        if len(wrong):
            raise RuntimeError(f"{len(wrong)} of {rows} rows of the log are not what the channel "
                               f"draws, such as {wrong.iloc[0].to_dict()}")
