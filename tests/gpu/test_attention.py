"""One new token a row against everything its row has cached: what PyTorch's attention gives, on rows of any length."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize(("heads", "shared", "size"), [(32, 32, 128), (9, 3, 64), (4, 2, 16), (6, 2, 24)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 2e-3)])
def test_it_is_pytorchs_attention(heads, shared, size, dtype, tolerance):
    from llama2tut.gpu.attention import attend

    torch.manual_seed(0)
    lengths = torch.tensor([5, 130, 0, 64, 1], device="cuda")
    starts = torch.tensor([3, 10, 150, 160, 240], device="cuda")

    def random(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype)

    keys, values = random(shared, 260, size), random(shared, 260, size)
    query, key, value = random(5, heads, size).transpose(0, 1), random(shared, 5, size), random(shared, 5, size)
    expected, kept = [], (keys.clone(), values.clone())
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        for cached, new in zip(kept, (key, value), strict=True):
            cached[:, start + length] = new[:, row]
        k, v = (cached[None, :, start:start + length + 1].float() for cached in kept)
        expected.append(scaled_dot_product_attention(query[None, :, row:row + 1].float(), k, v, scale=0.3,
                                                     enable_gqa=True)[0, :, 0])
    found = attend(query, key, value, keys, values, starts, lengths, 0.3)
    assert found.is_contiguous()
    assert torch.allclose(found.float(), torch.stack(expected), atol=tolerance, rtol=tolerance)
    assert torch.equal(keys, kept[0])
    assert torch.equal(values, kept[1])
