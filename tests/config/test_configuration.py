"""docs/configuration.md: generated, and true; and a run as it is stored."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from llama2tut.cli.building import build_request
from llama2tut.config.requests import FinetuneRequest
from llama2tut.config.runs import CONFIG_NAME, RunConfig, read_run
from llama2tut.errors import UsageError

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_configuration_doc.py"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_configuration_doc", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_is_what_the_code_says(generator):
    assert generator.FILE.read_text(encoding="utf-8") == generator.document(), \
        "run python scripts/make_configuration_doc.py"


def test_a_recipe_takes_the_keys_that_the_page_says(generator, tmp_path):
    refused = set()
    for field in dataclasses.fields(FinetuneRequest):
        (tmp_path / "r.yaml").write_text(f"{field.metadata.get('yaml', field.name)}: []\n")
        with pytest.raises(UsageError) as raised:
            build_request("finetune", {"task": "arithmetic", "config": str(tmp_path / "r.yaml")})
        if "is no key of a recipe" in str(raised.value):
            refused.add(field.name)
    assert refused == generator.FLAG_ONLY


def test_a_run_of_very_many_data_files_is_stored_and_read(tmp_path):
    """Also where a recipe of this size would be refused."""
    digests = {f"/data/of/somebody/train-{number:05}-of-10000.parquet": "0" * 64 for number in range(10_000)}
    config = RunConfig(
        request=FinetuneRequest(task="arithmetic", output_dir=tmp_path, epochs=7), model_path="toy", device="cpu",
        precision="fp32", quantization="none", attention="sdpa", gradient_checkpointing=False, liger=False,
        cuda_graphs=False, data_source="rows", digests=digests, versions={})
    assert config.write().stat().st_size > 1_000_000
    assert read_run(tmp_path) == config
    assert build_request("finetune", {"output_dir": str(tmp_path), "resume": "true"}).epochs == 7
    (tmp_path / CONFIG_NAME).rename(tmp_path / "recipe.yaml")
    with pytest.raises(UsageError, match="200,000 bytes"):
        build_request("finetune", {"task": "arithmetic", "config": str(tmp_path / "recipe.yaml")})
