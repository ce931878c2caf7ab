"""What survives a restart, and what one iteration did to it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from megatron_ext.checkpoint.save_load import Progress


@dataclass(slots=True)
class TrainState:
    """Where the run stands. All else (data position, learning rate, batch size) is a function of this."""

    iteration: int = 0
    """Finished iterations."""
    consumed_samples: int = 0
    """Samples of these iterations, whether they were trained on or passed over."""
    consumed_tokens: int = 0
    """Likewise."""
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=0))
    """Losses of the newest iterations that made an update; as many as a spike is measured against."""

    @classmethod
    def from_progress(cls, progress: Progress, *, kept_losses: int = 0) -> TrainState:
        """Continue from a checkpoint's progress, remembering so many losses."""
        state = cls(recent_losses=deque(maxlen=kept_losses))
        state.go_to(progress)
        return state

    def progress(self) -> Progress:
        """What a checkpoint of this state says."""
        return Progress(self.iteration, self.consumed_samples, self.consumed_tokens, tuple(self.recent_losses))

    def go_to(self, progress: Progress) -> None:
        """Stand where a checkpoint stood."""
        self.iteration = progress.iteration
        self.consumed_samples = progress.consumed_samples
        self.consumed_tokens = progress.consumed_tokens
        self.recent_losses.clear()
        self.recent_losses.extend(progress.recent_losses)

    def advance(self, result: StepResult) -> None:
        """Count a finished iteration; one that made no update counts too, so that samples stay where they are."""
        self.iteration += 1
        self.consumed_samples += result.samples
        self.consumed_tokens += result.tokens
        if result.updated:
            self.recent_losses.append(result.loss)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one iteration did. The same on every rank."""

    loss: float
    """Mean over the tokens that count, over all ranks; NaN where the iteration was passed over."""
    grad_norm: float
    """Global norm before clipping; NaN likewise."""
    lr: float
    samples: int
    """Global batch size."""
    tokens: int
    """samples x seq_length."""
    updated: bool = True
    """Whether parameters and optimizer were updated; where not, they are bit for bit what they were."""
    fault: str | None = None
    """What was found bad, and kept the update from being made."""


def is_due(state: TrainState, interval: int | None) -> bool:
    """Say whether something that happens every `interval` iterations is due; None is never."""
    return interval is not None and state.iteration % interval == 0
