"""What replaces transformers' own: the rotary embedding that Liger's kernel is given, a CPU's attention in bf16."""

import pytest


@pytest.fixture
def inputs():
    """Queries and keys as a decoder layer has them, with fewer heads for keys, and angles of left-padded rows."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    q, k = (torch.randn(3, 5, heads, 16).transpose(1, 2) for heads in (4, 2))
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [7, 8, 9, 10, 11]])
    return q, k, *LlamaRotaryEmbedding(config)(q, positions)


def turned_plainly(q, k, cos, sin):
    """The formula; transformers' own function may have been replaced by an earlier run of this process."""
    from transformers.models.llama.modeling_llama import rotate_half

    return [heads * cos.unsqueeze(1) + rotate_half(heads) * sin.unsqueeze(1) for heads in (q, k)]


def test_a_batch_shown_as_one_row_is_turned_as_before_and_not_copied(inputs):
    import torch

    from llama2tut.gpu.kernels import as_one_row

    seen = []

    def rope(q, k, cos, sin):
        seen.extend((q, k))
        assert {len(tensor) for tensor in (q, k, cos, sin)} == {1}
        return turned_plainly(q, k, cos, sin)

    q, k, cos, sin = inputs
    for angles in ((cos, sin), (cos[2:], sin[2:])):  # an angle for each row's tokens, and one for all rows
        for found, expected in zip(as_one_row(rope)(q, k, *angles), turned_plainly(q, k, *angles), strict=True):
            assert found.shape == expected.shape
            assert torch.equal(found, expected)
    assert [heads.data_ptr() for heads in seen] == [q.data_ptr(), k.data_ptr()] * 2


def test_gradients_pass_through_a_batch_shown_as_one_row(inputs):
    import torch

    from llama2tut.gpu.kernels import as_one_row

    q, k, cos, sin = inputs
    gradients = []
    for rope in (turned_plainly, as_one_row(turned_plainly)):
        heads = [tensor.clone().requires_grad_() for tensor in (q, k)]
        turned = rope(*heads, cos, sin)
        gradients.append(torch.autograd.grad((turned[0] ** 3).sum() + (turned[1] ** 3).sum(), heads))
    for plain, shown in zip(*gradients, strict=True):
        assert torch.equal(plain, shown)


@pytest.mark.gpu
def test_ligers_kernel_turns_a_batch_as_transformers_does(inputs):
    import torch

    from llama2tut.gpu.kernels import as_one_row, liger_available

    if not (torch.cuda.is_available() and liger_available()):
        pytest.skip("no GPU, or no Liger kernels")
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    q, k, cos, sin = (tensor.cuda() for tensor in inputs)
    expected = turned_plainly(q, k, cos, sin)
    for found, right in zip(as_one_row(liger_rotary_pos_emb)(q.clone(), k.clone(), cos, sin), expected, strict=True):
        assert torch.allclose(found, right, atol=1e-5)


def test_bf16_on_a_cpu_is_no_further_from_float32_than_pefts_own(toy_model_dir):
    import copy
    from types import SimpleNamespace

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from llama2tut.gpu.cuda_graphs import autocast_decoder
    from llama2tut.gpu.kernels import prepare

    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(toy_model_dir, dtype=torch.bfloat16, use_cache=False)
    plain = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    exact, ours = copy.deepcopy(plain).float(), copy.deepcopy(plain)
    autocast_decoder(plain.get_base_model().model, torch.bfloat16)
    prepare(ours, SimpleNamespace(gradient_checkpointing=False, precision="bf16", cuda_graphs=False, liger=False,
                                  device="cpu", request=SimpleNamespace(lora_dropout=0)))
    ids, mask = torch.randint(3, 260, (4, 24)), torch.ones(4, 24, dtype=torch.long)
    mask[1, 15:] = mask[2, 7:] = 0

    def gradients(model):
        model(input_ids=ids, attention_mask=mask, labels=ids.where(mask == 1, -100)).loss.backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])

    right = gradients(exact)
    assert (gradients(ours) - right).norm() < 1.1 * (gradients(plain) - right).norm()
