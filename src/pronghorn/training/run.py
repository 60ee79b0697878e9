"""One call of `Trainer.train`: the loop around the compiled step, and everything a run promises its user.

One step is compiled ahead of time, by `Trainer.compile` or here; its memory is reported before it runs. The loop only
picks the next batch, calls the program and hands metrics on; it waits for the device where a number must be looked at
(the first batch's gradients, an evaluation, a checkpoint) and nowhere else.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from pronghorn.converters.carried_files import chat_template_hash
from pronghorn.data.preview import visible
from pronghorn.errors import RunError
from pronghorn.fingerprint import base_hash
from pronghorn.lora import merge, split
from pronghorn.training import memory_plan, report, run_folder
from pronghorn.training.checkpoints import (
    CheckpointWriter,
    Retention,
    best_checkpoint,
    check_free_space,
    check_settings,
    restore,
)
from pronghorn.training.compile_run import require_weights
from pronghorn.training.flat_tree import as_tree
from pronghorn.training.flops import count_flops, device_peak_flops
from pronghorn.training.guards import SkippedStreak, check_leaf_gradients, excused_leaves, leaf_names
from pronghorn.training.held_out import HeldOutHistory
from pronghorn.training.incidents import Incidents
from pronghorn.training.interruption import Interruption
from pronghorn.training.losses import step_batch
from pronghorn.training.metrics import JsonLines, MetricsBuffer, Progress, peak_device_bytes
from pronghorn.training.result import Evaluation, TrainResult
from pronghorn.training.step import TrainState, compute_dtypes
from pronghorn.training.trackers import Trackers

# An adapter's A has a gradient once its B has moved; with a warm-up that takes two updates. Ten is patience enough.
_GUARDED_STEPS = 10


class Run:
    """One call of `Trainer.train`."""

    def __init__(self, trainer: Any, resume: bool | str, stop_after: int | None):
        self.trainer, self.config = trainer, trainer.config
        self.total = trainer.total_steps
        self.folder = Path(self.config.output_dir)
        self.stop_after = stop_after
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.evaluations: list[Evaluation] = []
        self.skipped = 0
        self.failed_saves = 0
        self.general_before: float | None = None
        self.general_after: float | None = None
        self.stopped_early = False
        self.saved_at: int | None = None
        self.trusted = False  # whether the gradients of this call's first step were as they should be
        self.held_out = HeldOutHistory(self.config.early_stopping, self.config.early_stopping_delta)
        self.retention = Retention(
            self.config.keep_checkpoints,
            self.config.keep_every,
            self.config.keep_best or self.config.best_at_end,
        )
        self.buffer = MetricsBuffer(self.config.log_every)
        self.streak = SkippedStreak(self.config.max_skipped_streak, self._rows_of)
        self.step_seconds = self.step_tokens = 0.0
        self.lap = time.perf_counter()
        self._prepare(resume)

    def _prepare(self, resume: bool | str) -> None:
        trainer, config = self.trainer, self.config
        checkpoint = run_folder.open_run_folder(
            self.folder, resume=resume, overwrite=config.overwrite, say=lambda text: print(text)
        )
        model = trainer.model
        self.graph, trainable, self.frozen = split(model)
        require_weights(trainable, self.frozen)
        self.settings = run_folder.run_settings(
            model,
            config,
            trainer.data,
            trainer.dataset.fingerprint,
            self.total,
            full=not jax.tree.leaves(self.frozen),
        )
        if checkpoint is not None:
            check_settings(checkpoint, self.settings)
        self.names = leaf_names(trainable, model)
        self.dtypes = compute_dtypes(trainable)
        self.frozen_leaves = jax.tree.leaves(self.frozen)
        programs = trainer.take_compiled()
        self.plan, prepared, self.compiled = programs.plan, programs.prepared, programs.compiled
        if config.save_every is not None:
            # The newest is written before the oldest goes.
            check_free_space(
                self.folder, self.plan.checkpoint * self.retention.most(config.save_every, self.total)
            )
        self.flops = count_flops(model.config, trainable, self.frozen)
        self.trainable, self.prepared, self.checkpoint = trainable, prepared, checkpoint
        self.start = self.step = 0 if checkpoint is None else checkpoint.step
        self.leaves: list[Any] = []

    def _start(self) -> None:
        """Make or read the state. From here to `_return_leaves` the model has no trainable leaves of its own."""
        if self.checkpoint is not None:
            state = restore(self.checkpoint, self.prepared.state)
            self.held_out.restore(self.checkpoint.metadata.get("held_out", {}))
            self.general_before = self.checkpoint.metadata.get("general_before")
        elif jax.tree.leaves(self.frozen):
            # An adapter is small: copied, so that nobody else's reference to its arrays dies with the donation.
            trainable = jax.tree.map(lambda x: x.copy(), self.trainable)
            state = self._start_state(trainable)
        else:
            state = self._start_state(self.trainable)
        self.leaves = jax.tree.leaves(state)
        self.skipped = int(state.skipped)
        if not jax.tree.leaves(self.frozen):
            # Every weight has a new place; the old one would cost the memory of the model once more.
            kept = {id(leaf) for leaf in self.leaves}
            for leaf in jax.tree.leaves(self.trainable):
                if id(leaf) not in kept:
                    leaf.delete()

    def _start_state(self, trainable: Any) -> TrainState:
        dtype = self.trainer.model.dtype
        return memory_plan.start_state(trainable, self.prepared.optimizer, self.config, dtype=dtype)

    def result(self) -> TrainResult:
        trainer, config = self.trainer, self.config
        if self.checkpoint is None:
            run_folder.clear_earlier_run(self.folder)
        run_folder.write_config(
            self.folder,
            {
                "train": config,
                "data": trainer.data,
                "model": trainer.model.config,
                "adapter": trainer.model.adapter,
                "settings that must match": self.settings,
                "hashes": {
                    "base": base_hash(trainer.model),
                    "data": trainer.dataset.fingerprint,
                    "held-out data": None
                    if trainer.eval_dataset is None
                    else trainer.eval_dataset.fingerprint,
                    "chat template": chat_template_hash(trainer.tokenizer),
                },
                "plan": self.plan,
            },
        )
        with contextlib.ExitStack() as stack:
            stack.callback(self._return_leaves)
            self._start()
            self.progress = Progress(self.total, done=self.start, log_every=config.log_every)
            stack.callback(self.progress.close)
            self._print_report()
            self.records = JsonLines(self.folder / run_folder.METRICS, keep_through=self.start)
            stack.callback(self.records.close)
            self.incidents = Incidents(
                self.folder / run_folder.INCIDENTS,
                config.spike_deviations,
                self._rows_of,
                self.progress.say,
                keep_through=self.start,
            )
            stack.callback(self.incidents.close)
            self.trackers = Trackers(
                (*("tensorboard",) * config.tensorboard, *config.trackers),
                self.folder,
                run_folder.flat({"train": config, "data": trainer.data, "adapter": trainer.model.adapter}),
                first_step=self.start + 1,
                say=self.progress.say,
            )
            stack.callback(self.trackers.close)
            self.writer = stack.enter_context(
                CheckpointWriter(self.folder / run_folder.CHECKPOINTS, self.retention)
            )
            if self.checkpoint is not None:
                self.writer.continue_from(self.start)
            if config.sample_every is not None:
                self.samples = JsonLines(self.folder / run_folder.SAMPLES, keep_through=self.start)
                stack.callback(self.samples.close)
            stop = stack.enter_context(Interruption())
            self._measure_general(after=False)
            if self.start == 0:
                self._sample()
            try:
                interrupted = self._loop(stop)
            except Exception as error:
                self._save_after_failure(error)
                raise
        return self._summary(interrupted)

    def _loop(self, stop: Interruption) -> bool:
        """Steps until the end or an interruption; returns whether it was interrupted."""
        config = self.config
        last = self.total if self.stop_after is None else min(self.total, self.start + self.stop_after)
        buffer = self.buffer
        self.lap = time.perf_counter()
        for host, device in self._steps(last, stop):
            buffer.add(host, device)
            step, at_end = host["step"], host["step"] == self.total
            evaluate = self.trainer.eval_dataset is not None and (
                at_end or (config.eval_every is not None and step % config.eval_every == 0)
            )
            save = config.save_every is not None and (at_end or step % config.save_every == 0)
            # Nothing is saved before its step's numbers have been looked at.
            self._record(buffer.ready(everything=evaluate or save or at_end or step == self.start + 1))
            if step == self.start + 1 and step < last:
                self.step_seconds = self.step_tokens = 0.0  # the first step warms libraries up
            heldout_loss = self._evaluate() if evaluate else None
            better = heldout_loss is not None and self.held_out.see(step, heldout_loss)
            if save or (better and self.retention.best):
                self._try_to_save(heldout_loss)
            if config.sample_every is not None and (at_end or step % config.sample_every == 0):
                self._sample()
            if evaluate and self.held_out.exhausted and not at_end:
                self.progress.say(
                    f"stopped early after step {step} of {self.total}: {self.held_out.stale} evaluations in a row "
                    f"were no better than step {self.held_out.best_step}'s {self.held_out.best_loss:.4f}."
                )
                self.stopped_early = True
                break
        self._record(buffer.ready(everything=True))
        interrupted = self.step < self.total and not self.stopped_early
        if interrupted:
            why = stop.requested or f"stop_after={self.stop_after}"
            if self.step > self.start:
                if self.saved_at != self.step:
                    self._save()
                self.writer.wait()
                saved = f"saved in {self.folder / run_folder.CHECKPOINTS}; go on with train.resume=true"
            else:
                saved = "nothing was done, so nothing is saved; start again" + (
                    " with train.resume=true" * bool(self.start)
                )
            self.progress.say(f"stopped by {why} after step {self.step} of {self.total}, {saved}.")
        elif self.step == self.start:
            self.progress.say(f"the run had all its {self.total} steps already; nothing is left to train.")
        if not interrupted:
            self._finish_saves()
            if config.best_at_end:
                self._take_best()
            if self.step > self.start:
                self._measure_general(after=True)
        return interrupted

    def _steps(self, last: int, stop: Interruption) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Dispatch step after step; yields what the host knows of each, and its metrics on the device."""
        guarded = True
        batches: Any = self.trainer.loader.iterate(self.step, last)
        with contextlib.closing(batches):
            for batch in batches:
                if stop.requested is not None:
                    return
                excused = excused_leaves(as_tree(self._state().trainable), self.names) if guarded else set()
                # Neither line waits: the batch travels, and the step is queued, while the one before still runs.
                placed = jax.device_put(step_batch(batch, self.trainer.data.packing))
                self.leaves, metrics = self.compiled(self.leaves, self.frozen_leaves, placed)
                self.step += 1
                leaf_grad_norms = metrics.pop("leaf_grad_norms")
                # A gradient that left float16's range says nothing; the next step's scale is lower.
                if guarded and not metrics.get("overflow", False):
                    check_leaf_gradients(self.names, leaf_grad_norms, excused, step=self.step)
                    guarded = bool(excused) and self.step - self.start < _GUARDED_STEPS
                self.trusted = True
                real = np.asarray(batch["segment_ids"]) > 0
                host = {
                    "step": self.step,
                    "real_tokens": int(real.sum()),
                    "flops": self.flops.of_batch(batch["positions"], real),
                }
                yield host, metrics

    def _rows_of(self, step: int) -> list[str]:
        """Where the rows of a step (counted from 1) came from."""
        rows = self.trainer.loader.documents_at(step - 1)
        return [self.trainer.dataset.origins[document] for row in rows for document in row]

    def _state(self) -> TrainState:
        return self.compiled.state(self.leaves)

    def _measure_general(self, *, after: bool) -> None:
        """Loss on general text, at the very start and at the end: their difference is what was forgotten."""
        if not after and self.start:
            return  # a resumed run knows it from its checkpoint
        found = self.trainer._evaluate_general(
            self._weights(self._state().trainable), self.frozen, step=self.step
        )
        if found is None:
            return
        record = {"step": self.step, "general_loss": found.loss, "general_token_count": found.token_count}
        self.records.write(record)
        self.records.flush()
        self.trackers.write(record, "eval")
        if not after:
            self.general_before = found.loss
            return
        self.general_after = found.loss
        if self.general_before is not None:
            self.progress.say(
                f"general text: loss {self.general_before:.4f} before, {found.loss:.4f} after; forgetting "
                f"{found.loss - self.general_before:+.4f} nats a token over {found.token_count:,} tokens"
            )

    def _sample(self) -> None:
        """Answers of the model as it is now: printed, and kept in samples.jsonl."""
        if self.trainer.sampler is None or self.config.sample_every is None:
            return
        texts = self.trainer.sampler(merge(self.graph, self._weights(self._state().trainable), self.frozen))
        for prompt, text in zip(self.config.sample_prompts, texts, strict=True):
            self.samples.write({"step": self.step, "prompt": prompt, "text": text})
            self.progress.say(f"step {self.step}: {visible(prompt)!r} -> {visible(text)!r}")
        self.samples.flush()
        self.lap = time.perf_counter()

    def _record(self, records: list[dict[str, Any]], *, judge: bool = True) -> None:
        """Write, show and (`judge`) check the records of finished steps."""
        if not records:
            return
        now = time.perf_counter()
        seconds, self.lap = now - self.lap, now
        tokens = sum(record["real_tokens"] for record in records)
        self.step_seconds += seconds
        self.step_tokens += tokens
        flops = sum(record.pop("flops") for record in records)
        peak = device_peak_flops(jax.devices()[0].device_kind)
        speed: dict[str, Any] = {
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds / len(records),
        }
        if peak is not None:
            speed["mfu"] = flops / seconds / peak
        in_use = peak_device_bytes()
        if in_use is not None:
            speed["peak_device_bytes"] = in_use
        # A step lost to the loss scale is no sign of trouble: the next one has a smaller scale.
        applied = [record.pop("applied") | record.pop("overflow", False) for record in records]
        for record in records:
            record |= speed
            self.losses.append(record["loss"])
            self.grad_norms.append(record["grad_norm"])
            self.skipped = record["skipped"]
            self.records.write(record)
            self.trackers.write(record, "train")
            self.progress.step(record)
        self.records.flush()
        for record, fine in zip(records, applied, strict=True):
            self.incidents.see(record, applied=fine)
        for record, fine in zip(records, applied, strict=True) if judge else ():
            self.streak.see(record["step"], applied=fine, token_count=record["token_count"])

    def _evaluate(self) -> float:
        state = self._state()
        evaluation = self.trainer._evaluate(self._weights(state.trainable), self.frozen, step=self.step)
        self.evaluations.append(evaluation)
        record = {"step": self.step, "eval_loss": evaluation.loss, "eval_token_count": evaluation.token_count}
        averaged = ""
        if state.ema is not None:
            ema_loss = self.trainer._evaluate(self._weights(state.ema), self.frozen, step=self.step).loss
            record["eval_loss_ema"], averaged = ema_loss, f", of the averaged weights {ema_loss:.4f}"
        self.records.write(record)
        self.records.flush()
        self.trackers.write(record, "eval")
        self.progress.say(
            f"step {self.step}: held-out loss {evaluation.loss:.4f} ({evaluation.token_count:,} tokens){averaged}"
        )
        self.lap = time.perf_counter()
        return evaluation.loss

    def _save(self, heldout_loss: float | None = None) -> None:
        metadata: dict[str, Any] = {
            "settings": self.settings,
            "held_out": self.held_out.metadata(),
            "general_before": self.general_before,
        }
        if heldout_loss is not None:
            metadata["heldout_loss"] = heldout_loss
        self.writer.save(self._state(), step=self.step, metadata=metadata)
        self.saved_at = self.step
        self.lap = time.perf_counter()

    def _try_to_save(self, heldout_loss: float | None) -> None:
        """Save, or say why not and train on: hours of work are not given up because a disk is full now."""
        try:
            self._save(heldout_loss)
        except RunError as error:
            self.failed_saves += 1
            self.progress.say(f"step {self.step}: {error} Training goes on without this checkpoint.")

    def _finish_saves(self) -> None:
        """Wait for the last checkpoint. The weights are in memory and about to be exported: a failure is only told."""
        try:
            self.writer.wait()
        except RunError as error:
            self.failed_saves += 1
            self.progress.say(f"step {self.step}: {error}")

    def _save_after_failure(self, error: Exception) -> None:
        """The steps that are done are not lost to what comes after them, such as a row that cannot be read."""
        finished = self.step > self.start and self.trusted and self.saved_at != self.step
        if not finished or any(leaf.is_deleted() for leaf in self.leaves):
            return
        try:
            self._record(self.buffer.ready(everything=True), judge=False)
            self._save()
            self.writer.wait()
        except Exception as second:  # the first error is the one to tell
            self.progress.say(f"after step {self.step} no checkpoint could be saved either: {second}")
            return
        self.progress.say(
            f"stopped after step {self.step} of {self.total} by {type(error).__name__}; what was trained is saved in "
            f"{self.folder / run_folder.CHECKPOINTS}, go on with train.resume=true."
        )

    def _take_best(self) -> None:
        """Replace the state by the best checkpoint's."""
        best = best_checkpoint(self.folder / run_folder.CHECKPOINTS, self.progress.say)
        if best is None:
            self.progress.say(
                "train.best_at_end: no checkpoint with a held-out loss is left; these are the last weights."
            )
            return
        if best.step != self.step:
            self.leaves = jax.tree.leaves(restore(best, self.prepared.state))
        self.progress.say(
            f"the weights are those of step {best.step}, whose held-out loss {best.metadata['heldout_loss']:.4f} is "
            "the smallest"
        )

    def _weights(self, trainable: Any) -> Any:
        """A state's parameters as a tree, in the dtypes of the model."""
        return jax.tree.map(lambda x, dtype: x.astype(dtype), as_tree(trainable), self.dtypes)

    def _return_leaves(self) -> None:
        """Give the model the trained leaves, in the dtypes it had."""
        if not self.leaves or any(leaf.is_deleted() for leaf in self.leaves):
            return  # the step itself failed: its donated state is gone, and the error on its way says why
        state = self._state()
        nnx.update(self.trainer.model, self._weights(state.ema if self.config.save_ema else state.trainable))

    def _print_report(self) -> None:
        trainer = self.trainer
        if self.start:
            self.progress.say(f"resumed after step {self.start} of {self.total}")
        report.print_report(
            self.progress.console,
            report.run_facts(trainer, self.total),
            self.plan,
            {"train": self.config, "data": trainer.data, "adapter": trainer.model.adapter},
            report.example_text(
                trainer.dataset,
                int(next(row[0] for row in trainer.loader.documents_at(0) if len(row))),
                trainer.tokenizer,
                colour=self.progress.console.is_terminal,
            ),
        )

    def _summary(self, interrupted: bool) -> TrainResult:
        finite = [norm for norm in self.grad_norms if np.isfinite(norm)]
        return TrainResult(
            steps=self.step,
            losses=self.losses,
            grad_norms=self.grad_norms,
            grad_norm_min=min(finite, default=float("nan")),
            final_loss=self.losses[-1] if self.losses else float("nan"),
            skipped=self.skipped,
            tokens_per_second=self.step_tokens / max(self.step_seconds, 1e-9),
            compile_seconds=self.compiled.seconds,
            peak_device_bytes=peak_device_bytes() or self.plan.peak_device_bytes,
            planned_device_bytes=self.plan.peak_device_bytes,
            planned_host_bytes=self.plan.peak_host_bytes,
            evaluations=self.evaluations,
            output_dir=str(self.folder),
            interrupted=interrupted,
            resumed_from=self.start,
            stopped_early=self.stopped_early,
            best_step=self.held_out.best_step,
            failed_saves=self.failed_saves,
            incidents=self.incidents.count,
            general_loss_before=self.general_before,
            general_loss_after=self.general_after,
        )
