"""What a run gives back."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out loss: nats a token over `token_count` trained tokens, after `step` updates."""

    step: int
    loss: float
    token_count: int


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Attributes:
      steps: updates made since step 0, those before a resume included; skipped ones count.
      losses, grad_norms: of each step of this call, in order; norms before clipping.
      grad_norm_min: the smallest of them that is finite; NaN where there is none.
      final_loss: the last of `losses`; NaN where there is none.
      skipped: steps of the whole run whose update was not finite and left out.
      tokens_per_second: real tokens, padding not counted, from the second step of this call on, without evaluations.
      compile_seconds: of the training step.
      peak_device_bytes: what the device reports for this process; where it reports nothing (CPU), the plan's.
      planned_device_bytes, planned_host_bytes: from the compiled step, before step 1.
      evaluations: every evaluation of this call.
      output_dir: the run's folder.
      interrupted: stopped by a signal or `stop_after`, with a checkpoint to resume from.
      resumed_from: step that this call began at; 0 for a new run.
      stopped_early: `train.early_stopping` ended the run before its last step.
      best_step: step of the smallest held-out loss of the whole run; None without evaluations. With
        `train.best_at_end` the model has the weights of that step.
      failed_saves: checkpoints of this call that the disk did not take; training went on.
      incidents: loss spikes and steps that were not finite, in this call; incidents.jsonl names their rows.
      general_loss_before, general_loss_after: on `train.general_text`; None where it was not measured.
    """

    steps: int
    losses: list[float]
    grad_norms: list[float]
    grad_norm_min: float
    final_loss: float
    skipped: int
    tokens_per_second: float
    compile_seconds: float
    peak_device_bytes: int
    planned_device_bytes: int
    planned_host_bytes: int
    evaluations: list[Evaluation]
    output_dir: str
    interrupted: bool
    resumed_from: int
    stopped_early: bool
    best_step: int | None
    failed_saves: int
    incidents: int
    general_loss_before: float | None
    general_loss_after: float | None
