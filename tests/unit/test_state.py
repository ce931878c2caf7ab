"""Where a run stands, and what happens when."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ext.checkpoint.save_load import Progress
from megatron_ext.training.state import StepResult, TrainState, is_due

RESULT = StepResult(loss=2.0, grad_norm=1.0, lr=1e-3, samples=8, tokens=128)


def test_state_after_an_iteration_has_its_samples_and_tokens():
    state = TrainState(iteration=10, consumed_samples=40, consumed_tokens=640)
    state.advance(RESULT)
    assert (state.iteration, state.consumed_samples, state.consumed_tokens) == (11, 48, 768)


def test_state_of_a_checkpoint_is_the_one_that_was_saved():
    state = TrainState(iteration=10, consumed_samples=40, consumed_tokens=640)
    assert state.progress() == Progress(10, 40, 640)
    assert TrainState.from_progress(state.progress()) == state


def test_iteration_without_an_update_counts_as_one_with():
    state = TrainState(iteration=10, consumed_samples=40, consumed_tokens=640)
    state.advance(replace(RESULT, updated=False))
    assert (state.iteration, state.consumed_samples, state.consumed_tokens) == (11, 48, 768)


def test_state_remembers_the_newest_losses_of_updates():
    state = TrainState.from_progress(Progress(0, 0, 0), kept_losses=3)
    for loss in (1.0, 2.0, 3.0, 4.0):
        state.advance(replace(RESULT, loss=loss))
    state.advance(replace(RESULT, loss=9.0, updated=False))
    assert state.progress().recent_losses == (2.0, 3.0, 4.0)


def test_state_that_goes_to_a_checkpoint_is_the_one_that_was_saved():
    state = TrainState.from_progress(Progress(10, 80, 1280, (3.0, 2.0)), kept_losses=3)
    saved = state.progress()
    state.advance(RESULT)
    state.go_to(saved)
    assert state.progress() == saved


def test_mean_loss_of_a_state_that_went_on_from_a_checkpoint_is_that_of_an_undisturbed_one():
    straight, state = TrainState(), TrainState()
    losses = (1 / 3, 0.1, 4.7380432415)  # whose sum depends on the order
    for loss in losses:
        straight.advance(replace(RESULT, loss=loss))
    for loss in losses:
        state.advance(replace(RESULT, loss=loss))
        state = TrainState.from_progress(state.progress())
    assert state.take_mean_loss() == straight.take_mean_loss() == sum(losses) / 3


def test_mean_loss_leaves_out_what_was_taken_before():
    state = TrainState()
    state.advance(replace(RESULT, loss=9.0))
    state.take_mean_loss()
    state.advance(replace(RESULT, loss=3.0))
    assert state.take_mean_loss() == 3.0


def test_mean_loss_without_an_update_is_none():
    state = TrainState()
    state.advance(replace(RESULT, updated=False))
    assert state.take_mean_loss() is None


def test_state_of_a_checkpoint_with_more_losses_remembers_the_newest():
    state = TrainState.from_progress(Progress(10, 80, 1280, (4.0, 3.0, 2.0)), kept_losses=2)
    assert list(state.recent_losses) == [3.0, 2.0]


@pytest.mark.parametrize(("iteration", "due"), [(1, False), (4, False), (5, True), (6, False), (10, True)])
def test_what_happens_every_five_iterations_is_due_at_their_multiples(iteration, due):
    assert is_due(TrainState(iteration=iteration), 5) is due


def test_what_never_happens_is_never_due():
    assert not is_due(TrainState(iteration=5), None)
