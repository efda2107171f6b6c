import pytest
import torch
from torch import nn

from vpd.rollout.onednn_linear import PackedLinear, make_packable

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN does not compute bfloat16 here"
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 100])
@torch.no_grad()
def test_gives_the_numbers_of_the_linear_layer_whose_weight_it_was_given(bias, rows):
    model = nn.Sequential(nn.Linear(40, 72, bias=bias, dtype=torch.bfloat16))
    inputs = torch.randn(2, rows, 40, dtype=torch.bfloat16)
    expected = model(inputs)
    weight = model[0].weight.clone()
    names = list(model.state_dict())
    layers = make_packable(model)
    assert list(layers) == ["0"]
    assert isinstance(layers["0"], PackedLinear)
    assert layers["0"] is model[0]
    layers["0"].pack(weight.float())
    model[0].weight.data = torch.empty(0, dtype=torch.bfloat16)
    torch.testing.assert_close(model(inputs), expected)
    assert list(model.state_dict()) == names
    layers["0"].pack(weight * 2)
    assert not torch.allclose(model(inputs), expected)


@torch.no_grad()
def test_unpacked_layers_hold_nothing():
    model = nn.Sequential(nn.Linear(40, 72, dtype=torch.bfloat16))
    layers = make_packable(model)
    layers["0"].unpack()
    layers["0"].pack(model[0].weight)
    layers["0"].unpack()
    assert not hasattr(model[0], "packed")


def test_other_layers_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4, dtype=torch.bfloat16))
    assert make_packable(model) == {}
    assert [type(module) for module in model] == [nn.Linear, nn.Embedding]
