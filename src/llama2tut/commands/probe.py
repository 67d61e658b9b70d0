"""What torch and bitsandbytes say about the device, as JSON on stdout: `python -m llama2tut.commands.probe cpu|cuda`.

A process of its own for `doctor`: a broken build can take its process down, and a hung driver never answers.
"""

import json
import sys
from typing import Any


def probe(device: str) -> dict[str, Any]:
    """`torch`, `cuda` (version that torch was built for, or None), `device` (`cpu` where a GPU does not start).

    Of a CPU: `cpu_bf16`, whether it computes in bfloat16.

    Of a GPU: `name`, `capability` (major, minor), `free` and `total` GiB; or `fault`: why it does not start.
    `four_bit` is "" where a 4-bit product on the device is right, else what is wrong with it; `fp8` the same of an fp8
    product over a 4-bit weight, on a GPU that makes them.
    """
    import torch

    from llama2tut.models.device import cpu_has_bf16, fp8_fault

    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": "cpu"}
    if device == "cuda":
        try:
            free, total = torch.cuda.mem_get_info(0)
            facts |= {"device": "cuda", "name": torch.cuda.get_device_name(0), "free": free / 2**30,
                      "total": total / 2**30, "capability": torch.cuda.get_device_capability(0)}
        except (RuntimeError, AssertionError) as error:
            facts["fault"] = str(error).strip().split("\n")[0]
    else:
        facts["cpu_bf16"] = cpu_has_bf16()
    facts["four_bit"] = four_bit_fault(facts["device"])
    if facts.get("capability", (0, 0)) >= (8, 9):
        facts["fp8"] = fp8_fault()
    return facts


def four_bit_fault(device: str) -> str:
    """Quantize a small matrix to nf4 on the device, multiply by it, and compare with the float product."""
    import torch

    # Each of the two would import torch's compiler, seconds of work, for functions that this product does not call.
    torch.compile = lambda model=None, **_: model or (lambda function: function)  # type: ignore[assignment]
    torch._disable_dynamo = lambda fn=None, **_: fn or (lambda function: function)  # type: ignore
    try:
        from bitsandbytes.autograd import _functions
        from bitsandbytes.functional import quantize_4bit

        generator, dtype = torch.Generator().manual_seed(0), torch.float16 if device == "cuda" else torch.float32
        weight, rows = (torch.randn(64, 64, generator=generator).to(device, dtype) for _ in range(2))
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        exact = (rows @ weight.T).float()
        off = float((_functions.matmul_4bit(rows, packed.t(), state).float() - exact).norm() / exact.norm())
    except Exception as error:  # whatever a broken build raises is the finding
        return str(error).strip().split("\n")[0] or type(error).__name__
    # nf4 rounds random weights by about a tenth of their size; a wrong kernel is off by the whole of it.
    return "" if off < 0.25 else f"the product is off by {off:.2f} of its size"


if __name__ == "__main__":
    json.dump(probe(sys.argv[1]), sys.stdout)
