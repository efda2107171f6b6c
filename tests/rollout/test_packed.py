import pytest
import torch
from torch import nn

from vpd.rollout.packed import PackedLinear, pack

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN does not compute bfloat16 here"
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 100])
@torch.no_grad()
def test_gives_the_numbers_of_the_linear_layer_and_follows_its_weight(bias, rows):
    model = nn.Sequential(nn.Linear(40, 72, bias=bias, dtype=torch.bfloat16))
    inputs = torch.randn(2, rows, 40, dtype=torch.bfloat16)
    expected = model(inputs)
    names = list(model.state_dict())
    pack(model)
    assert isinstance(model[0], PackedLinear)
    torch.testing.assert_close(model(inputs), expected)
    assert list(model.state_dict()) == names
    model[0].weight.mul_(2)
    torch.testing.assert_close(model(inputs), expected)
    pack(model)
    assert not torch.allclose(model(inputs), expected)


def test_other_layers_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4, dtype=torch.bfloat16))
    pack(model)
    assert [type(module) for module in model] == [nn.Linear, nn.Embedding]
