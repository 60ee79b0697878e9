"""`TrainConfig`: every setting of a training run, validated where it is made and printed before step 1."""

import dataclasses
import math
from typing import Literal, get_args

from pronghorn.errors import InputError

Schedule = Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt", "polynomial"]
OptimizerName = Literal["adamw", "adamw_8bit", "lion", "lion_8bit", "muon"]
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
MemoryPolicy = Literal[
    "auto", "keep", "attention", "layer_inputs", "offload_projections", "offload_attention", "offload"
]
MEMORY_POLICIES: tuple[str, ...] = get_args(MemoryPolicy)[1:]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; what it is trained on is `DataConfig`.

    Attributes:
      learning_rate: peak of the schedule.
      max_steps: optimizer updates of the whole run; None means `epochs` passes over the data.
      epochs: passes over the data, read only when `max_steps` is None; may be a fraction.
      batch_size: rows of one micro-batch (with packing, a row is `data.max_length` tokens of several documents).
      gradient_accumulation: micro-batches of one update. Loss sums and token counts are added over them and divided
        once, so 4 micro-batches of 2 rows give the update of 1 micro-batch of 8.
      schedule: after the warm-up, "cosine", "linear" and "polynomial" fall to `min_learning_rate_ratio` of the peak at
        the last step, "constant" stays, "wsd" stays and falls linearly over the last `decay_fraction` of the updates,
        "inverse_sqrt" falls with the root of the updates.
      min_learning_rate_ratio: where the schedules that fall end, as a share of the peak.
      decay_fraction: share of all updates over which "wsd" falls.
      schedule_power: exponent of "polynomial"; 1 is linear.
      warmup_steps: updates over which the learning rate rises linearly from 0 (as in transformers, the very first
        update of a warm-up has learning rate 0).
      optimizer: "adamw"; "adamw_8bit", its moments in 8 bits a value (2.03 bytes a parameter instead of 8); "lion"
        and "lion_8bit", with one moment (Lion wants about a third of AdamW's learning rate and beta2=0.99); "muon",
        for full fine-tuning: the matrices inside of layers by Muon, everything else by AdamW.
      paged_optimizer: keep the moments in pinned host memory and stream them through the device leaf by leaf; on a
        CPU, where that is the same memory, nothing changes.
      learning_rate_ratios: (pattern, ratio) pairs, such as ["*.mlp.*", 0.5]: a parameter whose name (layers.3.mlp.
        down_proj.lora_A) matches has that share of the learning rate; several that match are multiplied.
      lora_plus_ratio: the learning rate of every adapter's B as a multiple of A's (LoRA+).
      embedding_learning_rate: peak for embedding and head, where they are trained; None uses `learning_rate`.
      layer_decay: each layer has this share of the learning rate of the layer above it, and the embedding that of the
        first layer; 1 treats all alike.
      weight_decay: decoupled decay; norms, biases and other vectors are never decayed.
      beta1, beta2, eps: the moments and the denominator of AdamW; the first two are Lion's as well.
      max_grad_norm: gradients are scaled so that their global L2 norm is at most this; None never clips.
      max_grad_value: every element of the gradient is first clipped to this magnitude; None never clips.
      ema_decay: also keep an average of the trained weights, ema <- decay ema + (1 - decay) weights after every update;
        evaluations report its loss too. None keeps none.
      save_ema: the model that `train` leaves holds the average and not the last weights.
      initial_loss_scale: of models in float16, what the summed loss is multiplied by before it is differentiated, so
        that small gradients are not lost. It doubles after 200 updates in a row and halves when a gradient overflows;
        that step's update is left out and counted as `overflowed`, not as `skipped`.
      label_smoothing: share of the target's probability spread over the vocabulary, in [0, 1).
      router_aux_loss_coef: of a mixture of experts, the factor of the load-balancing loss, which is added to the loss
        and reported as `balance_loss`; 0 for none. None does what config.json asks for (`output_router_logits`).
      memory_policy: what the forward pass leaves for the backward pass, and where. On the device: "keep" (what the hand
        gradients need), "attention" (attention's output and the stream after it; q, k, v, gate and up are computed
        again), "layer_inputs" (the layer is computed again). In pinned host memory, moved while the device computes:
        "offload_projections" (q, k, v too; gate and up are computed again), "offload_attention", "offload" (layer
        inputs). "auto" compiles the fastest first, by what would be computed again and moved, and takes the first that
        fits the device.
      mlp_tile_tokens: tokens of a micro-batch that feed-forward networks take at a time, with the same result; they are
        then computed again in the backward pass under every policy. None takes all at once.
      head_tile_rows: tokens whose logits exist at a time; None takes about as many as fit 640 MiB (32 MiB on a CPU) in
        fp32.
      master_weights: in full fine-tuning of a 16-bit model, keep fp32 copies that the optimizer updates (adds 4
        bytes a parameter); adapters are always fp32.
      eval_every: evaluate on the held-out rows every so many steps, and at the end; None evaluates at the end only.
      eval_batch_size: rows of an evaluation batch; None uses `batch_size`.
      save_every: write a checkpoint every so many steps, and at the end; None writes one only when the run is
        interrupted (SIGTERM or Ctrl-C).
      keep_checkpoints: how many of the newest checkpoints stay on disk.
      keep_every: checkpoints of steps that are multiples of this stay for good; None keeps none for that.
      keep_best: also save a checkpoint after every evaluation with a new smallest held-out loss, and keep it until a
        better one is there.
      best_at_end: end with the weights of the evaluation with the smallest held-out loss (implies `keep_best`).
      early_stopping: stop after so many evaluations in a row whose held-out loss is no new best; None never does.
      early_stopping_delta: how much smaller, in nats a token, a held-out loss has to be to be a new best.
      log_every: steps between two printed lines where there is no terminal; metrics.jsonl has every step.
      seed: dropout's random stream (rows are shuffled by `data.seed`).
      output_dir: folder of the run: config.json, metrics.jsonl, checkpoints.
      overwrite: replace an earlier run in `output_dir`, which is refused otherwise.
      resume: go on from the newest complete checkpoint in `output_dir`; "auto" starts anew where there is none.
      tensorboard: also write TensorBoard events to `output_dir`/tensorboard; the same as naming it in `trackers`.
      trackers: where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow, trackio.
      sample_every: generate answers to `sample_prompts` every so many steps, before the first and after the last; they
        are printed and kept in samples.jsonl. None never does.
      sample_prompts: what is asked; put through the chat template where the tokenizer has one.
      sample_tokens: at most so many tokens an answer, without chance.
      general_text: prose whose loss is measured before and after, to see what was forgotten: "shipped" (a small text
        that comes with pronghorn), the path of a text file, or null for none.
      spike_deviations: a loss so many robust standard deviations above the last ones is written to incidents.jsonl
        with the rows of its batch; null writes only what is not finite.
      neftune_alpha: noise on the embeddings while training, uniform in ± alpha / sqrt(L d) for a document of L tokens
        of d numbers (Jain et al. 2023, NEFTune, https://arxiv.org/abs/2310.05914); 0 for none.
      max_skipped_streak: stop after so many steps in a row whose loss or gradient was not finite. Such a step never
        changes the weights.
      deterministic: ask XLA for kernels whose sums have a fixed order and whose choice does not depend on timing,
        at some cost in speed. Without it a rerun is bit-exact as long as the same compiled program is used.
      compile_cache: folder where compiled programs are kept between runs; None leaves jax's own setting.
    """

    learning_rate: float = 2e-4
    max_steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 1
    gradient_accumulation: int = 1
    schedule: Schedule = "cosine"
    min_learning_rate_ratio: float = 0.0
    decay_fraction: float = 0.1
    schedule_power: float = 2.0
    warmup_steps: int = 0
    optimizer: OptimizerName = "adamw"
    paged_optimizer: bool = False
    learning_rate_ratios: tuple[tuple[str, float], ...] = ()
    lora_plus_ratio: float = 1.0
    embedding_learning_rate: float | None = None
    layer_decay: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    max_grad_value: float | None = None
    ema_decay: float | None = None
    save_ema: bool = False
    initial_loss_scale: float = 4096.0
    label_smoothing: float = 0.0
    router_aux_loss_coef: float | None = None
    memory_policy: MemoryPolicy = "auto"
    mlp_tile_tokens: int | None = None
    head_tile_rows: int | None = None
    master_weights: bool = True
    eval_every: int | None = None
    eval_batch_size: int | None = None
    save_every: int | None = 500
    keep_checkpoints: int = 2
    keep_every: int | None = None
    keep_best: bool = False
    best_at_end: bool = False
    early_stopping: int | None = None
    early_stopping_delta: float = 0.0
    log_every: int = 10
    seed: int = 0
    output_dir: str = "runs/train"
    overwrite: bool = False
    resume: bool | Literal["auto"] = False
    tensorboard: bool = False
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    sample_every: int | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64
    general_text: str | None = "shipped"
    spike_deviations: float | None = 6.0
    neftune_alpha: float = 0.0
    max_skipped_streak: int = 5
    deterministic: bool = False
    compile_cache: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "gradient_accumulation",
            "keep_checkpoints",
            "log_every",
            "max_skipped_streak",
            "sample_tokens",
        ):
            self._at_least_one(name)
        for name in (
            "max_steps",
            "eval_every",
            "eval_batch_size",
            "save_every",
            "keep_every",
            "early_stopping",
            "mlp_tile_tokens",
            "head_tile_rows",
            "sample_every",
        ):
            if getattr(self, name) is not None:
                self._at_least_one(name)
        for name in (
            *("learning_rate", "epochs", "eps", "schedule_power", "lora_plus_ratio", "initial_loss_scale"),
            *(n for n in ("embedding_learning_rate", "max_grad_value") if getattr(self, n) is not None),
        ):
            self._check(name, getattr(self, name) > 0, "give a number over 0")
        for name in (
            *("weight_decay", "warmup_steps", "early_stopping_delta", "neftune_alpha"),
            *(n for n in ("router_aux_loss_coef",) if getattr(self, n) is not None),
        ):
            self._check(name, getattr(self, name) >= 0, "give 0 or more")
        for name in ("beta1", "beta2", "label_smoothing"):
            self._check(name, 0 <= getattr(self, name) < 1, "give a number in [0, 1)")
        if self.max_grad_norm is not None:
            self._check(
                "max_grad_norm", self.max_grad_norm > 0, "give a number over 0, or null for no clipping"
            )
        for name in ("decay_fraction", "layer_decay"):
            self._check(name, 0 < getattr(self, name) <= 1, "give a number over 0, up to 1")
        self._check(
            "min_learning_rate_ratio", 0 <= self.min_learning_rate_ratio <= 1, "give a number in [0, 1]"
        )
        if self.ema_decay is not None:
            self._check("ema_decay", 0 < self.ema_decay < 1, "give a number between 0 and 1")
        self._check("save_ema", not self.save_ema or self.ema_decay is not None, "give ema_decay with it")
        self._check(
            "learning_rate_ratios",
            all(len(p) == 2 and isinstance(p[0], str) and p[1] >= 0 for p in self.learning_rate_ratios),
            "give pairs of a pattern and a number, 0 or more",
        )
        for name, kinds in (("schedule", Schedule), ("optimizer", OptimizerName)):
            known = get_args(kinds)
            self._check(name, getattr(self, name) in known, f"use one of {', '.join(known)}")
        self._check(
            "paged_optimizer",
            not (self.paged_optimizer and self.optimizer == "muon"),
            "muon's moments stay on the device",
        )
        self._check(
            "memory_policy",
            self.memory_policy in ("auto", *MEMORY_POLICIES),
            f"use auto, or one of {', '.join(MEMORY_POLICIES)}",
        )
        self._check("output_dir", bool(self.output_dir), "name a folder")
        self._check("seed", 0 <= self.seed < 2**32, "give a whole number from 0 to 2**32 - 1")
        if self.max_steps is not None:
            self._check("warmup_steps", self.warmup_steps < self.max_steps, "give fewer than max_steps")

        for name in ("early_stopping", "keep_best", "best_at_end"):
            if getattr(self, name):
                self._check(
                    name, self.eval_every is not None, "set train.eval_every, since it goes by evaluations"
                )
        if self.spike_deviations is not None:
            self._check("spike_deviations", self.spike_deviations > 0, "give a number over 0, or null")
        for name in ("trackers", "sample_prompts"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in self.trackers:
            self._check("trackers", name in _TRACKERS, f"use {', '.join(_TRACKERS)}")
        if self.sample_every is not None:
            self._check("sample_prompts", bool(self.sample_prompts), "give one, or train.sample_every: null")
        if self.keep_every is not None:
            self._check("keep_every", self.save_every is not None, "set train.save_every as well")

    def _at_least_one(self, name: str) -> None:
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        self._check(name, whole and value >= 1, "give a whole number, 1 or more")

    def _check(self, name: str, fine: bool, cure: str) -> None:
        value = getattr(self, name)
        if not fine or (isinstance(value, float) and not math.isfinite(value)):
            raise InputError(f"train.{name}: {value!r} cannot be used; {cure}.")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Updates of the whole run: `max_steps`, else `epochs` times the steps of one pass, rounded up."""
        if self.max_steps is not None:
            return self.max_steps
        total = max(1, math.ceil(self.epochs * steps_per_epoch - 1e-9))
        self._check(
            "warmup_steps", self.warmup_steps < total, f"the run has {total} steps, give fewer than that"
        )
        return total
