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
    unreported_updates: int = 0
    """Updates since the last row of metrics, which says their mean loss however often the run starts in between."""
    unreported_loss_sum: float = 0.0
    """Of their losses."""
    grad_norm: float = 0.0
    """Of the newest update."""

    @classmethod
    def from_progress(cls, progress: Progress, *, kept_losses: int = 0) -> TrainState:
        """Continue from a checkpoint's progress, remembering so many losses."""
        state = cls(recent_losses=deque(maxlen=kept_losses))
        state.go_to(progress)
        return state

    def progress(self) -> Progress:
        """What a checkpoint of this state says."""
        return Progress(
            iteration=self.iteration,
            consumed_samples=self.consumed_samples,
            consumed_tokens=self.consumed_tokens,
            recent_losses=tuple(self.recent_losses),
            unreported_updates=self.unreported_updates,
            unreported_loss_sum=self.unreported_loss_sum,
            grad_norm=self.grad_norm,
        )

    def go_to(self, progress: Progress) -> None:
        """Stand where a checkpoint stood."""
        self.iteration = progress.iteration
        self.consumed_samples = progress.consumed_samples
        self.consumed_tokens = progress.consumed_tokens
        self.recent_losses.clear()
        self.recent_losses.extend(progress.recent_losses)
        self.unreported_updates = progress.unreported_updates
        self.unreported_loss_sum = progress.unreported_loss_sum
        self.grad_norm = progress.grad_norm

    def advance(self, result: StepResult) -> None:
        """Count a finished iteration; one that made no update counts too, so that samples stay where they are."""
        self.iteration += 1
        self.consumed_samples += result.samples
        self.consumed_tokens += result.tokens
        if result.updated:
            self.recent_losses.append(result.loss)
            self.unreported_updates += 1
            self.unreported_loss_sum += result.loss
            self.grad_norm = result.grad_norm

    def take_mean_loss(self) -> float | None:
        """Give the mean loss of the updates since the last call, and begin anew; None where there was none."""
        updates, loss_sum = self.unreported_updates, self.unreported_loss_sum
        self.unreported_updates, self.unreported_loss_sum = 0, 0.0
        return loss_sum / updates if updates else None


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
