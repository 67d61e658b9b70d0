"""Frozen weights multiplied in fp8: exact codes, products within what rounding explains, no NaN out of nowhere."""

import json
from types import SimpleNamespace

import pytest
import torch

from llama2tut.gpu.fp8 import (
    E4M3,
    Fp8Linear,
    Fp8Mlp,
    multiply_in_fp8,
    nf4_to_fp8,
    quantize_rows,
    swiglu,
    swiglu_gradients,
    takes,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(16, 64), (48, 64), (192, 576), (1536, 576), (576, 1536), (80, 1088), (272, 128)]  # outputs, inputs


@nf4_to_fp8.register_kernel("cpu")
def unpacked(packed, scales, codes, transposed):
    """The same in plain PyTorch, so that products can be tested where there is no GPU."""
    pairs = torch.stack([packed >> 4, packed & 15], dim=-1).view(*scales.shape, 64)
    weight = (codes[pairs.long()] * scales.float()[..., None]).view(len(scales), -1).to(E4M3)
    return weight.t().contiguous() if transposed else weight


@swiglu.register_kernel("cpu")
def activated(gate, up, gate_more, up_more):
    """The same in plain PyTorch."""
    kept = [] if gate_more is None else [gate + gate_more, up + up_more]
    gate, up = (rows.float() for rows in kept or (gate, up))
    product = torch.nn.functional.silu(gate) * up
    return [*quantize_rows(product), *kept, *([product.bfloat16()] if kept else [])]


@swiglu_gradients.register_kernel("cpu")
def gradients_of_activated(gradient, more, gate, up, gate_outputs, up_outputs):
    """The same by PyTorch's own derivative."""
    outer, gate, up = (gradient if more is None else gradient + more).float(), gate.float(), up.float()
    silu = torch.nn.functional.silu(gate)
    to_gate, to_up, product = torch.ops.aten.silu_backward(outer * up, gate), outer * silu, silu * up
    kept = [] if more is None else [rows.bfloat16() for rows in (to_gate, to_up, product)]
    return [*quantize_rows(to_gate * gate_outputs), *quantize_rows(to_up * up_outputs), *kept]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
        pytest.skip("no GPU that multiplies in fp8")
    torch.manual_seed(0)
    return request.param


def nf4(weight, device):
    """A layer as bitsandbytes packs it, its scales quantised, too."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", compress_statistics=True,
                              compute_dtype=torch.bfloat16)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to(device)


def plain(weight, device):
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False).requires_grad_(False)
    layer.weight.data = weight
    return layer.to(device)


def off(found, exact):
    assert found.isfinite().all()
    return float((found.float() - exact.float()).norm() / exact.float().norm())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_code_of_every_block_is_unpacked_exactly(device, shape, transposed):
    rows, columns = shape
    packed = torch.arange(rows * columns // 2).mul(37).remainder(256).to(torch.uint8)  # every pair of codes
    scales = (torch.rand(rows, columns // 64) * 448).half()
    scales.view(-1)[::5] = torch.tensor([0, 448, 1e-3, -2.0]).half().repeat(len(scales.view(-1)))[:len(
        scales.view(-1)[::5])]
    codes = torch.tensor([-1, *torch.rand(14).mul(2).sub(1).sort().values.tolist(), 1])
    found = nf4_to_fp8(packed.to(device), scales.to(device), codes.to(device), transposed).cpu()
    expected = unpacked(packed, scales, codes, transposed)
    assert found.shape == ((columns, rows) if transposed else shape)
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_unpacked_weights_are_bitsandbytes_own_within_one_rounding_to_fp8(device):
    from bitsandbytes.functional import dequantize_4bit

    layer = nf4(torch.randn(192, 576) * 0.02, device)
    fp8 = Fp8Linear(layer)
    found = nf4_to_fp8(fp8.stored, fp8.blocks, fp8.codes, False).float() * fp8.outputs[:, None]
    exact = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    assert (found - exact).abs().max() <= exact.abs().max() * 2**-4
    assert off(found, exact) < 0.03  # three bits of mantissa


@pytest.mark.parametrize("pack", [nf4, plain])
@pytest.mark.parametrize("tokens", [(1,), (7,), (3, 33), (2, 128)])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_input_gradient_are_those_of_bf16_within_fp8s_rounding(device, shape, tokens, pack):
    layer = pack((torch.randn(shape) * 0.02).bfloat16(), device)
    x = torch.randn(*tokens, shape[1], device=device, dtype=torch.bfloat16, requires_grad=True)
    exact = layer(x)
    gradient = torch.randn_like(exact)
    found = Fp8Linear(layer)(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    assert off(found, exact) < 0.05  # 3.7 % was measured at the shape of a 7B model: two roundings of 2.6 % each
    of_found, of_exact = (torch.autograd.grad(product, x, gradient)[0] for product in (found, exact))
    assert off(of_found, of_exact) < 0.05


def test_channels_a_thousand_times_larger_cost_their_own_row_alone(device):
    """Real 7B models have a few such channels; they take most of a row's range, and the rest keeps three bits."""
    weight = torch.randn(192, 576) * 0.02
    layer = nf4(weight.bfloat16(), device)
    for factor in (100, 1000):
        x = torch.randn(64, 576)
        x[:32, ::191] *= factor  # in half of the rows
        x = x.to(device, torch.bfloat16).requires_grad_()
        exact, found = layer(x), Fp8Linear(layer)(x)
        assert off(found[32:], exact[32:]) < 0.05
        assert off(found[:32], exact[:32]) < 0.05
        small = x.detach().clone()
        small[:, ::191] = 0
        codes, scale = quantize_rows(x.detach())
        kept = (codes.float() * scale)
        kept[:, ::191] = 0
        assert off(kept, small) < (0.05 if factor == 100 else 0.10)


def test_rows_of_zeros_stay_zero_and_infinities_become_the_largest_number(device):
    layer = nf4(torch.cat([torch.zeros(16, 64), torch.randn(16, 64)]).bfloat16(), device)
    fp8 = Fp8Linear(layer)
    x = torch.randn(6, 64, device=device, dtype=torch.bfloat16)
    x[0], x[1, 3], x[2, 5], x[3] = 0, torch.inf, -torch.inf, 1e-38
    alone = fp8(x[4:])
    x.requires_grad_()
    found = fp8(x)
    assert not found.isnan().any()
    assert (found[0] == 0).all()
    assert found[:, :16].abs().max() < 1e-6 * 448 or not found[:, :16].isnan().any()
    assert torch.equal(found[4:], alone)
    gradient = torch.ones_like(found)
    gradient[0], gradient[1, 20] = 0, torch.inf
    of_x, = torch.autograd.grad(found, x, gradient)
    assert not of_x.isnan().any()
    assert (of_x[0] == 0).all()


def test_nan_is_not_hidden(device):
    fp8 = Fp8Linear(nf4(torch.randn(16, 64).bfloat16(), device))
    x = torch.randn(2, 64, device=device, dtype=torch.bfloat16)
    x[1, 0] = torch.nan
    found = fp8(x)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def rows_like(shape, device, factor=1.0):
    """Rows of ordinary numbers, one of zeros, one with an outlier, and one of large negative numbers."""
    rows = torch.randn(shape) * factor
    rows[0], rows[1, 3], rows[2] = 0, 1000, -200
    return rows.to(device, torch.bfloat16)


def same_codes(found, scale, right, right_scale):
    """Whether codes mean the same numbers: a sigmoid's last bit may take a number over a border between two codes."""
    torch.testing.assert_close(scale, right_scale, rtol=1e-5, atol=0)
    off_by = (found.float() - right.float()).abs()
    assert (off_by <= right.float().abs() * 2**-3 + 2**-9).all()
    assert (off_by > 0).float().mean() < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("width", [64, 192, 576, 1024, 1536, 11008])
def test_swiglu_and_its_gradients_are_pytorchs_in_one_pass(width, adapters):
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
        pytest.skip("no GPU that multiplies in fp8")
    torch.manual_seed(0)
    gate, up, gate_more, up_more, gradient, more = (rows_like((33, width), "cuda") for _ in range(6))
    outputs = torch.rand(2, width, device="cuda") + 0.1
    extra = (gate_more, up_more) if adapters else (None, None)
    found, right = swiglu(gate, up, *extra), activated(gate, up, *extra)
    same_codes(*found[:2], *right[:2])
    back = (gradient, more if adapters else None, *(right[2:4] if adapters else (gate, up)), *outputs)
    found_back, right_back = swiglu_gradients(*back), gradients_of_activated(*back)
    same_codes(*found_back[:2], *right_back[:2])
    same_codes(*found_back[2:4], *right_back[2:4])
    for one, other in zip([*found[2:], *found_back[4:]], [*right[2:], *right_back[4:]], strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6)


def mlp(device, adapted):
    """A Llama MLP in nf4 whose adapters do something, and its layers one by one in fp8."""
    import peft
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    torch.manual_seed(0)
    plain_mlp = LlamaMLP(LlamaConfig(hidden_size=128, intermediate_size=192))
    for name, (outputs, inputs) in (("gate_proj", (192, 128)), ("up_proj", (192, 128)), ("down_proj", (128, 192))):
        setattr(plain_mlp, name, Fp8Linear(nf4((torch.randn(outputs, inputs) * 0.2).bfloat16(), device)))
    for name in adapted:
        frozen = getattr(plain_mlp, name)
        layer = peft.tuners.lora.Linear(torch.nn.Linear(frozen.in_features, frozen.out_features), "default",
                                        peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False), r=4, lora_alpha=8)
        layer.base_layer = frozen
        setattr(plain_mlp, name, layer.to(device))
    return plain_mlp


@pytest.mark.parametrize("adapted", [(), ("gate_proj", "up_proj", "down_proj")], ids=["frozen", "adapted"])
def test_an_mlp_in_one_is_its_layers_one_by_one(device, adapted):
    one_by_one = mlp(device, adapted)
    x = torch.randn(3, 11, 128, device=device, dtype=torch.bfloat16)
    x[0, 0], x[1, 2, 5] = 0, 100
    outer = torch.randn(3, 11, 128, device=device, dtype=torch.bfloat16)

    def results(module):
        rows = x.clone().requires_grad_()
        weights = [weight for weight in module.parameters() if weight.requires_grad]
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            product = module(rows)
        return product, *torch.autograd.grad(product, (rows, *weights), outer)

    exact, found = results(one_by_one), results(Fp8Mlp(one_by_one))
    assert len(found) == 2 + 2 * len(adapted)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == other.dtype
        assert off(one, other) < 0.03  # one of both rounds SwiGLU to bf16 before fp8


def test_an_mlp_whose_adapters_are_off_is_the_frozen_one(device):
    adapted = mlp(device, ("gate_proj", "up_proj", "down_proj"))
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(adapted, name).enable_adapters(False)
    x = torch.randn(5, 128, device=device, dtype=torch.bfloat16)
    assert torch.equal(Fp8Mlp(adapted)(x), Fp8Mlp(mlp(device, ()))(x))


def test_frozen_layers_are_replaced_where_their_shape_allows_it(device):
    import peft

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nf4(torch.randn(64, 64).bfloat16(), device)
            self.odd = plain(torch.randn(24, 40).bfloat16(), device)

        def forward(self, x):
            return self.q_proj(x)

    model = peft.get_peft_model(Decoder(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    decoder = model.get_base_model()
    x = torch.randn(5, 64, device=device)
    before = decoder(x)
    multiply_in_fp8(decoder)
    assert isinstance(decoder.q_proj.base_layer, Fp8Linear)
    assert isinstance(decoder.odd, torch.nn.Linear)
    assert type(decoder.q_proj.lora_A["default"]) is torch.nn.Linear
    assert off(decoder(x), before) < 0.05
    assert not takes(40, 24)


@pytest.mark.gpu
def test_compiled_and_captured_it_is_what_it_is_alone():
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
        pytest.skip("no GPU that multiplies in fp8")
    torch.manual_seed(0)
    layer = Fp8Linear(nf4((torch.randn(192, 576) * 0.02).bfloat16(), "cuda"))
    rows = torch.randn(33, 576, device="cuda", dtype=torch.bfloat16)
    rows[0], rows[1, 7] = 0, torch.inf
    gradient = torch.randn(33, 192, device="cuda", dtype=torch.bfloat16)

    def leaf():
        return rows.clone().requires_grad_()  # a capture must not meet the streams of an earlier pass

    def both(function):
        x = leaf()
        product = function(x)
        return product.detach(), *torch.autograd.grad(product, x, gradient)

    captured = torch.cuda.make_graphed_callables(layer, (leaf(),))
    exact = both(layer)
    for function in (torch.compile(layer, fullgraph=True), captured):
        for found, right in zip(both(function), exact, strict=True):
            assert torch.equal(found, right)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["up_proj"]], ids=str)
def test_a_whole_models_gradients_are_nearer_to_bf16s_than_nf4_is_to_the_weights(device, toy_model_dir, checkpointing,
                                                                                 targets):
    """Of a padded batch with an odd number of tokens, through PEFT and autocast."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from llama2tut.gpu.kernels import prepare

    ids = torch.randint(3, 260, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0

    def loss_and_gradients(quantization, precision):
        torch.manual_seed(1)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                    bnb_4bit_compute_dtype=torch.bfloat16) if quantization == "4bit" else None
        base = AutoModelForCausalLM.from_pretrained(toy_model_dir, dtype=torch.bfloat16, quantization_config=config,
                                                    device_map={"": device})
        model = peft.get_peft_model(base, peft.LoraConfig(r=1, target_modules=targets))
        prepare(model, SimpleNamespace(gradient_checkpointing=checkpointing, precision=precision, cuda_graphs=False,
                                       liger=False, device=device, sharded=False,
                                       request=SimpleNamespace(lora_dropout=0)))
        assert sum(isinstance(module, Fp8Linear) for module in model.modules()) == 14 * (precision == "fp8")
        assert sum(isinstance(module, Fp8Mlp) for module in model.modules()) == (
            2 * (precision == "fp8" and targets != ["up_proj"]))
        loss = model.train()(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False,
                             labels=ids.masked_fill(mask == 0, -100).to(device)).loss
        loss.backward()
        return loss.item(), torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])

    exact = {quantization: loss_and_gradients(quantization, "bf16") for quantization in ("none", "4bit")}
    rounding = off(exact["4bit"][1], exact["none"][1])
    for quantization, (loss, gradients) in exact.items():
        found = loss_and_gradients(quantization, "fp8")
        assert found[0] == pytest.approx(loss, rel=0.01)
        assert 0 < off(found[1], gradients) < rounding


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [
    ("--compile", "--packing"), ("--quantization", "none", "--compile", "--packing", "--gradient-checkpointing", "on"),
    ("--no-packing", "--lora-dropout", 0.1, "--batch-size", 3, "--gradient-accumulation-steps", 2),
], ids=str)
def test_finetune_in_fp8_can_be_resumed_to_the_last_digit(run_cli, tmp_path, arithmetic_dir, toy_model_dir, flags):
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
        pytest.skip("no GPU that multiplies in fp8")
    run = ["finetune", "--task", "arithmetic", "--data", arithmetic_dir, "--model", toy_model_dir, "--precision", "fp8",
           "--context-length", 128, "--limit", 60, "--lora-r", 1, "--eval-generate", 2, "--save-steps", 2,
           "--max-steps", 5, *flags]
    metrics = []
    for folder in ("whole", "resumed"):
        done = run_cli(*run, "--output-dir", tmp_path / folder)
        assert done.code == 0, done.err
        assert ", fp8, base weights" in done.err
    (tmp_path / "resumed" / "training.json").unlink()  # as if it had been killed at its end: it goes on after step 4
    assert run_cli(*run, "--output-dir", tmp_path / "resumed", "--resume").code == 0
    for folder in ("whole", "resumed"):
        entries = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        metrics.append({(entry["step"], name): entry[name] for entry in entries for name in ("loss", "eval_loss")
                        if name in entry})
    assert metrics[0] == metrics[1]
