"""What survives a restart, and what one iteration did to it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.checkpoint.save_load import Progress


@dataclass(slots=True)
class TrainState:
    """Where the run stands. All else (data position, learning rate, batch size) is a function of this."""

    iteration: int = 0
    """Finished iterations."""
    consumed_samples: int = 0
    consumed_tokens: int = 0

    @classmethod
    def from_progress(cls, progress: Progress) -> TrainState:
        """Continue from a checkpoint's progress."""
        return cls(progress.iteration, progress.consumed_samples, progress.consumed_tokens)

    def progress(self) -> Progress:
        """What a checkpoint of this state says."""
        return Progress(self.iteration, self.consumed_samples, self.consumed_tokens)

    def advance(self, result: StepResult) -> None:
        """Count a finished iteration."""
        self.iteration += 1
        self.consumed_samples += result.samples
        self.consumed_tokens += result.tokens


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one iteration did. The same on every rank."""

    loss: float
    """Mean over the tokens that count, over all ranks."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    samples: int
    """Global batch size."""
    tokens: int
    """samples x seq_length."""


def is_due(state: TrainState, interval: int | None) -> bool:
    """Say whether something that happens every `interval` iterations is due; None is never."""
    return interval is not None and state.iteration % interval == 0
