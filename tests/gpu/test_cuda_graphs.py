"""The decoder as CUDA graphs, compiled on the way: plain PEFT's loss and gradients, whatever else goes on."""

import pytest

pytestmark = pytest.mark.gpu
ROWS, WIDTH = 2, 128


@pytest.fixture(autouse=True)
def gpu():
    """Skips without a GPU, and forgets what was compiled."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch._dynamo.reset()


def peft_model(dtype, *, checkpointed=False):
    """A small Llama with adapters that do something; the same weights at every call."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                         initializer_range=0.1, attn_implementation="flex_attention", use_cache=False)
    base = LlamaForCausalLM(config).to(torch.bfloat16).to("cuda", dtype)  # weights that both types hold exactly
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    if checkpointed:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={
            "use_reentrant": False, "preserve_rng_state": False})
        base.enable_input_require_grads()
    return model.train()


def captured(dtype, **options):
    """The same model with its decoder prepared as a run prepares it."""
    import torch

    from llama2tut.gpu.cuda_graphs import autocast_decoder, capture_decoder

    model = peft_model(dtype, **options)
    decoder = model.get_base_model().model
    if dtype == torch.bfloat16:
        autocast_decoder(decoder, dtype)
    capture_decoder(decoder, ROWS, WIDTH)
    return model


def batch(seed, width=WIDTH):
    """Rows of three packed examples each, the last tokens padding."""
    import torch

    from llama2tut.training.packing import collate

    chance = torch.Generator().manual_seed(seed)
    lengths = [width // 2, width // 4, width // 8]
    rows = []
    for _ in range(ROWS):
        ids = [torch.randint(3, 320, (length,), generator=chance).tolist() for length in lengths]
        rows.append([{"input_ids": one, "labels": [-100] * 3 + one[3:], "attention_mask": [1] * len(one)}
                     for one in ids])
    return {name: tensor.cuda() for name, tensor in collate(rows, packed=True, width=width, pad_id=0).items()}


def losses_and_gradients(model, *batches):
    """Each batch's loss, and the gradients accumulated over all, as one float32 vector."""
    import torch

    model.zero_grad()
    losses = []
    for one in batches:  # forward and backward in turns: a graph's next forward overwrites what its backward reads
        losses.append(model(**one).loss)
        losses[-1].backward()
    gradients = [weight.grad.float().flatten() for weight in model.parameters() if weight.requires_grad]
    return torch.stack(losses).detach().float(), torch.cat(gradients)


def apart(found, exact):
    """How far two vectors are from each other, as a share of the second one's length."""
    return float((found - exact).norm() / exact.norm())


def assert_same(found, exact):
    for one, other in zip(found, exact, strict=True):
        assert apart(one, other) < 1e-5


@pytest.mark.parametrize("checkpointed", [False, True], ids=["activations kept", "gradient checkpointing"])
def test_float32_gives_plain_pefts_loss_and_gradients(checkpointed):
    import torch

    plain, graphed = peft_model(torch.float32), captured(torch.float32, checkpointed=checkpointed)
    assert_same(losses_and_gradients(graphed, batch(1)), losses_and_gradients(plain, batch(1)))
    assert_same(losses_and_gradients(graphed, batch(2), batch(3)), losses_and_gradients(plain, batch(2), batch(3)))
    with torch.no_grad():  # as an optimizer's step and a resumed adapter do
        for one, other in zip(plain.parameters(), graphed.parameters(), strict=True):
            if one.requires_grad:
                one.mul_(1.5)
                other.mul_(1.5)
    assert_same(losses_and_gradients(graphed, batch(4)), losses_and_gradients(plain, batch(4)))
    other_shape = batch(5, width=2 * WIDTH)
    assert_same(losses_and_gradients(graphed, other_shape), losses_and_gradients(plain, other_shape))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["activations kept", "gradient checkpointing"])
def test_bf16_is_no_further_from_float32_than_plain_bf16(checkpointed):
    import torch

    batches = [batch(seed) for seed in range(8)]
    exact = losses_and_gradients(peft_model(torch.float32), *batches)
    plain = losses_and_gradients(peft_model(torch.bfloat16), *batches)
    found = losses_and_gradients(captured(torch.bfloat16, checkpointed=checkpointed), *batches)
    # Eight losses round by chance, the gradients of thousands of weights hardly.
    for one, usual, right, room in zip(found, plain, exact, (1.5, 1.1), strict=True):
        assert apart(one, right) < room * apart(usual, right)


def test_a_batch_with_a_mask_takes_the_plain_path():
    import torch

    plain, graphed = peft_model(torch.float32), captured(torch.float32)
    padded = batch(6)
    padded["attention_mask"] = torch.ones_like(padded.pop("position_ids"))
    assert_same(losses_and_gradients(graphed, padded), losses_and_gradients(plain, padded))
