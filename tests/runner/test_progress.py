"""The line that says how far a long cell is: what it shows, and that a log keeps nothing of it but its end."""

from types import SimpleNamespace

import pytest

from runner import progress


@pytest.fixture
def shown(monkeypatch):
    """What a notebook would show: (data, whether it replaces what was there)."""
    sent = []

    def display(data, raw, display_id):
        sent.append((data, False))
        return SimpleNamespace(update=lambda data, raw: sent.append((data, True)))

    monkeypatch.setattr(progress, "display", display)
    monkeypatch.setattr(progress, "DRAWN", 0)
    return sent


def test_a_line_comes_into_view_and_is_then_replaced(shown):
    progress.Line("nothing yet").show("**half**")
    first, *texts = shown
    assert list(first[0]) == ["application/javascript"] and not first[1]  # no text for a log
    assert texts == [({"text/markdown": "nothing yet"}, True), ({"text/markdown": "**half**"}, True)]


def test_the_line_of_a_training(shown, monkeypatch):
    clock = iter([100.0, 104.0, 112.0, 112.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    line = progress.TrainingLine(progress.Line("before the first step"))
    state = SimpleNamespace(global_step=10, max_steps=110)  # it goes on from a checkpoint
    line.on_train_begin(None, state, None)
    state.global_step = 12
    line.on_step_end(None, state, None)
    state.global_step = 14
    line.on_log(None, state, None, logs={"clean_mean": "0.25", "observed_mean": 0.5})
    line.on_log(None, state, None, logs={"clean_mean": 0.75})  # all rewards were withheld
    line.on_log(None, state, None, logs={"train_runtime": 1.0})
    texts = [data["text/markdown"] for data, update in shown if update]
    assert texts[1:] == ["step 12/110: 2.00 s a step, 3 min left",
                         "step 14/110: clean reward 0.250, observed 0.500, 3.00 s a step, 5 min left",
                         "step 14/110: clean reward 0.750, 3.00 s a step, 5 min left"]


@pytest.mark.parametrize("seconds, words", [(0, "0 s"), (99, "99 s"), (120, "2 min"), (7200, "2.0 h")])
def test_durations_in_words(seconds, words):
    assert progress.in_words(seconds) == words
