"""One optimizer step through upstream's loop: what its gradients are made of."""

import json

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

TASK = """
def get_custom_dataset(config, tokenizer, split):
    lengths = {lengths} if split == "train" else [4]
    return [dict(input_ids=[1, 5 + row, *range(20, 20 + length)], labels=[-100] * 2 + [*range(20, 20 + length)])
            for row, length in enumerate(lengths)]
"""


@pytest.fixture
def gradients(run_cli, toy_model_dir, tmp_path):
    """The gradients of the first optimizer step over rows with answers of these lengths, and that step's loss."""
    def run(lengths, batch_size, accumulation):
        seen = []
        task, folder = tmp_path / "rows.py", tmp_path / f"{batch_size}x{accumulation}"
        task.write_text(TASK.format(lengths=lengths))
        handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(torch.cat(
            [weight.grad.flatten() for group in optimizer.param_groups for weight in group["params"]
             if weight.requires_grad])))
        try:
            outcome = run_cli("finetune", "--task", task, "--model", toy_model_dir, "--gpus", 0, "--precision", "fp32",
                              "--no-packing", "--batch-size", batch_size, "--gradient-accumulation-steps", accumulation,
                              "--set", "gradient_clipping=False", "--epochs", 1, "--lora-dropout", 0,
                              "--output-dir", folder)
        finally:
            handle.remove()
        assert outcome.code == 0, outcome.err
        return seen[0], json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]

    return run


@pytest.mark.parametrize(("rows", "ways"), [(8, [(8, 1), (4, 2), (1, 8)]), (7, [(7, 1), (3, 4), (2, 5)])],
                         ids=["a whole step", "a step that ends early"])
def test_every_trained_token_counts_once_however_a_step_is_divided(gradients, rows, ways):
    lengths = [*[1] * (rows - 1), 80]
    (whole, loss), *others = (gradients(lengths, *way) for way in ways)
    assert whole.norm() > 0
    for found, its_loss in others:
        assert torch.allclose(found, whole, rtol=1e-4, atol=1e-6 * whole.abs().max())
        assert its_loss == pytest.approx(loss, rel=1e-5)
