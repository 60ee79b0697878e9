"""Fifty steps of one LoRA job here, through the Trainer, and in transformers + PEFT, in fp32.

Both start from the same base and the same adapter and see the same batches. The other side is written as plainly as
torch allows: sums over micro-batches, one division, `clip_grad_norm_`, `torch.optim.AdamW`, transformers' scheduler.
"""

import numpy as np
import pytest

from pronghorn.converters.huggingface import load_model
from pronghorn.converters.peft import save_adapter
from pronghorn.data import DataConfig
from pronghorn.lora import LoRAConfig, add_lora
from pronghorn.models import named_parameters
from pronghorn.training import TrainConfig, Trainer
from tests.converters import tiny_models
from tests.training.small import tokenized

pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STEPS = 50
LOSS, GRAD_NORM, ADAPTER = 1e-4, 1e-3, 1e-3  # relative, from the project's promise; never loosened
CONFIG = TrainConfig(
    learning_rate=1e-2,
    max_steps=STEPS,
    batch_size=2,
    gradient_accumulation=2,
    warmup_steps=5,
    schedule="cosine",
    weight_decay=0.01,
    max_grad_norm=2.0,
    save_every=None,
)


def documents(count, seed=7):
    """Token lists of 6 to 20 tokens with something to learn: each repeats a pattern of its own."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        pattern = random.integers(3, tiny_models.VOCAB, random.integers(2, 5))
        made.append(np.resize(pattern, random.integers(6, 21)).tolist())
    return made


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(ours, theirs): {"losses", "grad_norms", "adapter": {canonical name: array}}."""
    import jax

    root = tmp_path_factory.mktemp("fifty")
    base = tiny_models.save(tiny_models.make("llama", num_hidden_layers=2), root / "base")
    with jax.default_matmul_precision("highest"):
        model = add_lora(load_model(base), LoRAConfig(rank=4, alpha=8))
        save_adapter(model, root / "start")
        config = TrainConfig(**{**vars(CONFIG), "output_dir": str(root / "run")})
        data = DataConfig(max_length=20, packing=False)
        trainer = Trainer(model, None, tokenized(documents(30), untrained=3), config, data=data)
        result = trainer.train()
    adapter = {name: np.array(p.get()) for name, p in named_parameters(model).items() if ".lora_" in name}
    ours = {"losses": result.losses, "grad_norms": result.grad_norms, "adapter": adapter}
    return ours, train_with_peft(base, root / "start", trainer.loader)


def train_with_peft(base, adapter, loader):
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=CONFIG.learning_rate,
        betas=(CONFIG.beta1, CONFIG.beta2),
        eps=CONFIG.eps,
        weight_decay=CONFIG.weight_decay,
    )
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, CONFIG.warmup_steps, STEPS)
    losses, norms = [], []
    for step in range(STEPS):
        batch = {name: torch.tensor(values).long() for name, values in loader.batch_at(step).items()}
        count = int((batch["labels"][..., 1:] != -100).sum())
        loss = 0.0
        for micro in range(CONFIG.gradient_accumulation):
            logits = model(
                input_ids=batch["input_ids"][micro], attention_mask=(batch["segment_ids"][micro] > 0).long()
            ).logits
            part = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch["labels"][micro][:, 1:].flatten(), reduction="sum"
            )
            (part / count).backward()
            loss += float(part.detach()) / count
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, CONFIG.max_grad_norm)))
        losses.append(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    adapter = {
        name.removeprefix("base_model.model.model.").removesuffix(".weight"): value.numpy()
        for name, value in peft.get_peft_model_state_dict(model).items()
    }
    return {"losses": losses, "grad_norms": norms, "adapter": adapter}


def test_the_job_is_one_that_learns_and_clips(both):
    ours, _ = both
    assert np.mean(ours["losses"][-10:]) < 0.8 * np.mean(ours["losses"][:10])
    assert max(ours["grad_norms"]) > CONFIG.max_grad_norm > min(ours["grad_norms"])


def test_loss_curves_are_equal(both):
    ours, theirs = both
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=LOSS)


def test_gradient_norms_are_equal(both):
    ours, theirs = both
    np.testing.assert_allclose(ours["grad_norms"], theirs["grad_norms"], rtol=GRAD_NORM)


def test_final_adapters_are_equal(both):
    ours, theirs = both
    assert set(ours["adapter"]) == set(theirs["adapter"]) and len(ours["adapter"]) == 2 * 7 * 2
    for name, value in theirs["adapter"].items():
        error = np.linalg.norm(ours["adapter"][name] - value) / np.linalg.norm(value)
        assert error <= ADAPTER, (name, error)
