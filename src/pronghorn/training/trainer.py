"""`Trainer`: a model, its data and its settings, joined; `run.py` is what happens when it trains."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pronghorn.data import DataConfig, Dataset, Loader, hold_out, load_rows, read_sets, tokenize_rows
from pronghorn.data.general_text import general_text_rows
from pronghorn.errors import InputError
from pronghorn.lora import split
from pronghorn.models.parameters import named_parameters
from pronghorn.quantization import is_quantized
from pronghorn.training import memory_plan
from pronghorn.training.compile_run import CompiledRun, compile_run, program_key, require_weights
from pronghorn.training.config import TrainConfig
from pronghorn.training.losses import step_batch
from pronghorn.training.result import Evaluation, TrainResult
from pronghorn.training.run import Run


class Trainer:
    """Fine-tunes a model: its adapters where it has any, every weight where it has none.

    Example:
      >>> trainer = ph.Trainer(model, tokenizer, "rows.jsonl", ph.TrainConfig(max_steps=60))
      >>> trainer.train().final_loss

    Args:
      model: a Decoder, or one of shapes to `compile` for. While `train` runs, its trainable leaves belong to the
        trainer (their buffers are reused by the step); when it returns or raises, they are the trained ones.
      tokenizer: of the model; None is fine for a dataset that is tokenised already.
      dataset: a path or hub name, rows, or tokenised rows; None reads `data.path` or `data.mixture`.
      config: how to train.
      data: how rows become tokens and batches.
      eval_dataset: held-out rows, in the same forms as `dataset`; None takes `data.eval_path`, or holds out
        `data.eval_fraction` of the rows of `dataset`.
      sampler: gives a model's answers to `config.sample_prompts` (`pronghorn.generation.sampler`).

    Raises:
      InputError: for data or settings that cannot be used.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        dataset: Any,
        config: TrainConfig | None = None,
        *,
        data: DataConfig | None = None,
        eval_dataset: Any = None,
        sampler: Callable[[Any], list[str]] | None = None,
    ):
        if any(is_quantized(p.variable.get_value()) for p in named_parameters(model).values()):
            memory_plan.refuse_full_fine_tuning(model.adapter is not None)
        self.model = model
        self.tokenizer = tokenizer
        self.config = config or TrainConfig()
        self.sampler = sampler
        if self.config.sample_every is not None and sampler is None:
            raise InputError(
                "train.sample_every: there is nothing to generate with; give the Trainer "
                "sampler=pronghorn.generation.sampler(tokenizer, prompts)."
            )
        self.data = data or DataConfig()
        if eval_dataset is None and not (dataset is None or isinstance(dataset, str | Path)):
            eval_dataset = self.data.eval_path
        if dataset is None or (isinstance(dataset, str | Path) and tokenizer is not None):
            dataset, held_out = self._read(dataset, eval_dataset is None)
            eval_dataset = held_out if eval_dataset is None else eval_dataset
        if not isinstance(dataset, Dataset):
            dataset = load_rows(dataset, self.data.split)
            if eval_dataset is None and self.data.eval_fraction:
                dataset, eval_dataset = hold_out(dataset, self.data.eval_fraction, self.data.seed)
        self.dataset = self._tokenized(dataset, "dataset")
        self.eval_dataset = None if eval_dataset is None else self._tokenized(eval_dataset, "eval_dataset")
        if self.eval_dataset is None and (
            self.config.early_stopping or self.config.keep_best or self.config.best_at_end
        ):
            raise InputError(
                "train.early_stopping, train.keep_best and train.best_at_end go by held-out rows, and there are none; "
                "give data.eval_path or data.eval_fraction."
            )
        self.loader = Loader(
            self.dataset,
            batch_size=self.config.batch_size,
            micro_batches=self.config.gradient_accumulation,
            max_length=self.data.max_length,
            packing=self.data.packing,
            seed=self.data.seed,
        )
        self.total_steps = self.config.total_steps(len(self.loader))
        self._compiled: CompiledRun | None = None
        self._evaluation: Any = None
        self._eval_loader: Any = None
        self._general_loader: Any = None

    def _read(self, path: str | Path | None, held_out: bool) -> tuple[Dataset, Dataset | None]:
        data = self.data
        if path is not None:
            data = dataclasses.replace(data, path=str(path), mixture=())
        if not held_out:
            data = dataclasses.replace(data, eval_path=None, eval_fraction=0.0)
        return read_sets(data, self.tokenizer, self.model.config.vocab_size)

    def _tokenized(self, dataset: Any, what: str) -> Dataset:
        vocab_size = self.model.config.vocab_size
        if not isinstance(dataset, Dataset):
            if self.tokenizer is None:
                raise InputError(
                    f"{what}: rows need a tokenizer, and there is none; give one, or tokenised rows."
                )
            return tokenize_rows(load_rows(dataset), self.tokenizer, self.data, vocab_size=vocab_size)
        if dataset.stats.trained_tokens == 0:
            raise InputError(
                f"{what}: none of its {dataset.stats.real_tokens} tokens is in the loss, so nothing would be learned; "
                "look at data.format and data.loss_on."
            )
        largest = dataset.largest_token
        if largest >= vocab_size:
            raise InputError(
                f"{what}: it has the token id {largest}, and the model's vocabulary ends at {vocab_size - 1}; use the "
                "model's own tokenizer."
            )
        return dataset

    def compile(self) -> memory_plan.MemoryPlan:
        """Compile the step, and the evaluation, for the shapes of the model as it is; `train` compiles them otherwise.

        While it compiles, XLA tries products out on the device, with operands as large as the largest weight. So that
        these never lie beside weights, compile with a model of shapes alone, and set `model` afterwards:

          >>> trainer = ph.Trainer(abstract_model, tokenizer, "rows.jsonl")
          >>> trainer.compile()
          >>> trainer.model = model

        The next `train` takes the programs where all that they depend on is still the same (the model's structure,
        shapes and dtypes, the settings, the batches); otherwise it compiles its own.

        Returns:
          The memory that a step takes.

        Raises:
          InputError: no memory policy fits the device.
        """
        self._compiled = self._evaluation = None
        self._compiled = compile_run(self)
        return self._compiled.plan

    def evaluate(self) -> Evaluation:
        """Loss on the held-out rows with the model as it is, weighted by token, without dropout.

        Raises:
          InputError: there are no held-out rows.
        """
        _, trainable, frozen = split(self.model)
        require_weights(trainable, frozen)
        self._forget_stale_programs()
        return self._evaluate(trainable, frozen, step=0)

    def train(self, resume: bool | str = False, *, stop_after: int | None = None) -> TrainResult:
        """Run, or go on with, the training run in `config.output_dir`.

        SIGTERM and Ctrl-C finish the step, save a checkpoint and return a result with `interrupted` set.

        Args:
          resume: go on from the newest complete checkpoint; the continued run is bit-exact with one that was never
            interrupted. "auto" starts anew where there is none. `config.resume` does the same.
          stop_after: stop and save after so many steps of this call, as a signal would (for time-limited machines).

        Raises:
          InputError: the folder holds another run, or the checkpoint is of another run.
          RunError: a trainable leaf without a gradient, too many skipped steps, no room on the disk.
        """
        return Run(self, resume or self.config.resume, stop_after).result()

    def take_compiled(self) -> CompiledRun:
        """What `compile` made, if it is for this model and these settings, and else made now; it is kept no longer."""
        self._forget_stale_programs()
        compiled, self._compiled = self._compiled, None
        return compile_run(self) if compiled is None else compiled

    def _forget_stale_programs(self) -> None:
        if self._compiled is not None and self._compiled.key != program_key(self):
            self._compiled = self._evaluation = None

    def _evaluate(self, trainable: Any, frozen: Any, *, step: int) -> Evaluation:
        if self.eval_dataset is None:
            raise InputError("eval_dataset: there are no held-out rows; give eval_dataset or data.eval_path.")
        if self._eval_loader is None:
            self._eval_loader = self._evaluation_loader(self.eval_dataset)
        return self._loss_of(self._eval_loader, trainable, frozen, step=step)

    def _evaluate_general(self, trainable: Any, frozen: Any, *, step: int) -> Evaluation | None:
        """Loss on `config.general_text`; None where there is none, or no tokenizer to read it with."""
        if self.config.general_text is None or self.tokenizer is None:
            return None
        if self._general_loader is None:
            path = None if self.config.general_text == "shipped" else self.config.general_text
            data = DataConfig(
                format="text",
                loss_on="all",
                max_length=self.data.max_length,
                packing=self.data.packing,
                overlong="split",
            )
            rows = load_rows(general_text_rows(path))
            dataset = tokenize_rows(rows, self.tokenizer, data, vocab_size=self.model.config.vocab_size)
            self._general_loader = self._evaluation_loader(dataset)
        return self._loss_of(self._general_loader, trainable, frozen, step=step)

    def _loss_of(self, loader: Loader, trainable: Any, frozen: Any, *, step: int) -> Evaluation:
        compiled = self._compiled_evaluation(trainable, frozen)
        sums = [
            compiled(trainable, frozen, step_batch(loader.batch_at(index), self.data.packing))
            for index in range(len(loader))
        ]
        losses, counts = zip(*jax.device_get(sums), strict=True)
        # In fp64: the sum over a whole set has more digits than fp32.
        tokens = int(np.sum(counts, dtype=np.int64))
        return Evaluation(step, float(np.sum(losses, dtype=np.float64)) / max(1, tokens), tokens)

    def _evaluation_loader(self, dataset: Dataset) -> Loader:
        return Loader(
            dataset,
            batch_size=self.config.eval_batch_size or self.config.batch_size,
            micro_batches=1,
            max_length=self.data.max_length,
            packing=self.data.packing,
            seed=self.data.seed,
            shuffle=False,
            weighted=False,
        )

    @property
    def _evaluates(self) -> bool:
        """Whether the run has anything to evaluate on."""
        general = self.config.general_text is not None and self.tokenizer is not None
        return self.eval_dataset is not None or general

    def _compiled_evaluation(self, trainable: Any, frozen: Any) -> Any:
        """The program of every evaluation of the run; None where there is nothing to evaluate on."""
        if not self._evaluates:
            return None
        if self._evaluation is None:
            graph, _, _ = split(self.model)
            rows = self.config.eval_batch_size or self.config.batch_size
            batch = memory_plan.abstract_batch((1, rows, self.data.max_length), self.data.packing)
            self._evaluation = memory_plan.compile_evaluation(graph, trainable, frozen, batch)
        return self._evaluation
