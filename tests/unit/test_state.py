"""Where a run stands, and what happens when."""

from __future__ import annotations

import pytest

from megatron_ext.checkpoint.save_load import Progress
from megatron_ext.training.state import StepResult, TrainState, is_due

RESULT = StepResult(loss=2.0, grad_norm=1.0, lr=1e-3, samples=8, tokens=128)


def test_state_after_an_iteration_has_its_samples_and_tokens():
    state = TrainState(iteration=10, consumed_samples=40, consumed_tokens=640)
    state.advance(RESULT)
    assert state == TrainState(iteration=11, consumed_samples=48, consumed_tokens=768)


def test_state_of_a_checkpoint_is_the_one_that_was_saved():
    state = TrainState(iteration=10, consumed_samples=40, consumed_tokens=640)
    assert state.progress() == Progress(10, 40, 640)
    assert TrainState.from_progress(state.progress()) == state


@pytest.mark.parametrize(("iteration", "due"), [(1, False), (4, False), (5, True), (6, False), (10, True)])
def test_what_happens_every_five_iterations_is_due_at_their_multiples(iteration, due):
    assert is_due(TrainState(iteration=iteration), 5) is due


def test_what_never_happens_is_never_due():
    assert not is_due(TrainState(iteration=5), None)
