"""One line of a notebook's output that says how far a long cell is."""

import time

from IPython.display import display
from transformers import TrainerCallback

# Run All leaves a reader at the end of the notebook, far below the cell that takes its time. Only
# whoever is still there is taken to the line, as soon as it is on the page. JupyterLab alone runs
# this; a terminal shows nothing of it.
COME_INTO_VIEW = """
setTimeout(() => {
  const page = element.closest('.jp-WindowedPanel-outer');
  if (page && page.scrollTop + 2 * page.clientHeight > page.scrollHeight) {
    element.scrollIntoView({block: 'center'});
  }
}, 100);
"""
DRAWN = 0.5  # seconds until that has happened


class Line:
    """A line that is written anew each time. An executed notebook keeps the last state of it."""

    def __init__(self, text: str):
        self.output = display({"application/javascript": COME_INTO_VIEW}, raw=True, display_id=True)
        time.sleep(DRAWN)
        self.show(text)

    def show(self, text: str):
        """Replace the line."""
        self.output.update({"text/markdown": text}, raw=True)


class TrainingLine(TrainerCallback):
    """Step, rewards as they were last logged, seconds a step and time left, in one line."""

    def __init__(self, line: Line):
        self.line, self.rewards = line, ""

    def on_train_begin(self, args, state, control, **_):
        """Note where this start of the run begins."""
        self.began, self.first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **_):
        """Note the rewards. Without an observed one, all were withheld."""
        if "clean_mean" not in logs:
            return
        self.rewards = f"clean reward {float(logs['clean_mean']):.3f}, "
        if "observed_mean" in logs:
            self.rewards += f"observed {float(logs['observed_mean']):.3f}, "
        self.show(state)

    def on_step_end(self, args, state, control, **_):
        """Count the step."""
        self.show(state)

    def show(self, state):
        """Bring the line up to date."""
        done = state.global_step - self.first
        a_step = (time.monotonic() - self.began) / max(1, done)
        left = in_words(a_step * (state.max_steps - state.global_step))
        self.line.show(f"step {state.global_step}/{state.max_steps}: {self.rewards}"
                       f"{a_step:.2f} s a step, {left} left")


def in_words(seconds: float) -> str:
    """A duration, such as "50 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
