"""Adapters combined by weights, against PEFT's `add_weighted_adapter`."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from pronghorn.cli import main
from pronghorn.converters.combine import combine_adapters
from pronghorn.converters.huggingface import load_model
from pronghorn.converters.peft import load_adapter
from pronghorn.errors import InputError
from pronghorn.lora_sites import sites
from tests.converters import tiny_models
from tests.converters.test_peft import peft_logits, peft_made, transformers_model
from tests.tolerances import MODEL_LOGITS

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, [adapter of rank 4, of rank 4 with another scale, of rank 2 on other modules])."""
    root = tmp_path_factory.mktemp("combined")
    base = tiny_models.save(tiny_models.make("llama", num_hidden_layers=1), root / "base")
    options = (
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "lora_alpha": 3, "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"], "r": 2},
    )
    folders = []
    for number, option in enumerate(options):
        peft_made(base, root / f"a{number}", **option)
        path = root / f"a{number}" / "adapter_model.safetensors"
        random = np.random.default_rng(number)
        stored = safetensors.numpy.load_file(str(path))
        moved = {
            key: value + random.normal(0, 0.1, value.shape).astype(np.float32)
            for key, value in stored.items()
        }
        safetensors.numpy.save_file(moved, str(path))
        folders.append(root / f"a{number}")
    return base, folders


def deltas(base, folder):
    """{module: s B A}."""
    found = {}
    for name, site in sites(load_adapter(load_model(base), folder)).items():
        if site.adapted:
            a, b, scale, *_ = site.factors
            found[name] = scale * np.asarray(b, np.float64) @ np.asarray(a, np.float64)
    return found


def test_concatenation_is_the_weighted_sum_exactly(made, tmp_path):
    base, folders = made
    weights = (0.7, -0.4, 1.5)
    report = combine_adapters(folders, weights, tmp_path / "out")
    assert (report["rank"], report["modules"]) == (10, 3)
    parts = [deltas(base, folder) for folder in folders]
    for name, value in deltas(base, tmp_path / "out").items():
        wanted = sum(w * part[name] for w, part in zip(weights, parts, strict=True) if name in part)
        np.testing.assert_allclose(value, wanted, atol=1e-6)
    ours = load_adapter(load_model(base), tmp_path / "out")
    prompt = tiny_models.prompt()
    assert np.abs(peft_logits(base, tmp_path / "out") - tiny_models.ours(ours, prompt)).max() <= MODEL_LOGITS


@pytest.mark.parametrize("method", ["cat", "linear", "svd"])
def test_every_method_is_pefts(made, tmp_path, method):
    import peft

    base, folders = made
    weights = [0.75, -0.5]
    combine_adapters(folders[:2], weights, tmp_path / "out", method=method)
    model = peft.PeftModel.from_pretrained(transformers_model(base), str(folders[0]), adapter_name="one")
    model.load_adapter(str(folders[1]), adapter_name="two")
    model.add_weighted_adapter(["one", "two"], weights, "both", combination_type=method)
    model.set_adapter("both")
    theirs = tiny_models.logits(model.eval(), tiny_models.prompt())
    ours = tiny_models.ours(load_adapter(load_model(base), tmp_path / "out"), tiny_models.prompt())
    assert np.abs(ours - theirs).max() <= MODEL_LOGITS


def test_the_command_tells_what_a_smaller_rank_loses(made, tmp_path, capsys):
    _, folders = made
    numbers = tmp_path / "n.json"
    arguments = [*map(str, folders[:2]), "--method", "svd", "--rank", "3", "--json", str(numbers)]
    assert main(["merge-adapters", str(tmp_path / "out"), *arguments]) == 0
    report = json.loads(numbers.read_text())
    assert report["rank"] == 3 and 0.01 < report["lost"] < 0.9 and "norm lost" in capsys.readouterr().out


def test_what_cannot_be_combined_is_refused(made, tmp_path):
    _, folders = made
    for arguments, message in (
        ((folders[:1], [1.0]), "two adapters or more"),
        ((folders, [1.0, 2.0]), "2 weights for 3"),
        ((folders[:2], [0.0, 0.0]), "all zero"),
    ):
        with pytest.raises(InputError, match=message):
            combine_adapters(*arguments, tmp_path / "out")
    shutil.copytree(folders[0], tmp_path / "experts")
    tiny_models.edit_json(
        tmp_path / "experts" / "adapter_config.json", target_parameters=["experts.down_proj"]
    )
    with pytest.raises(InputError, match="bare parameters"):
        combine_adapters([tmp_path / "experts", folders[1]], [1.0, 1.0], tmp_path / "out")
    with pytest.raises(InputError, match="linear needs adapters of one rank"):
        combine_adapters(folders, [1.0, 1.0, 1.0], tmp_path / "out", method="linear")
    assert not (tmp_path / "out").exists()
