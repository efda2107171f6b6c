import pytest
import torch
from torch import nn

from vpd.rollout.onednn_linear import RearrangedLinear, rearrange_linears

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
    names, parameters = list(model.state_dict()), list(model.parameters())
    layers = rearrange_linears(model)
    assert list(layers) == ["0"]
    assert isinstance(layers["0"], RearrangedLinear)
    assert layers["0"] is model[0]
    # The parameters are the same objects, so that ties stay.
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    layers["0"].rearrange(weight.float())
    model[0].weight.data = torch.empty(0, dtype=torch.bfloat16)
    torch.testing.assert_close(model(inputs), expected)
    assert list(model.state_dict()) == names
    layers["0"].rearrange(weight * 2)
    assert not torch.allclose(model(inputs), expected)


@torch.no_grad()
def test_released_layers_hold_nothing():
    model = nn.Sequential(nn.Linear(40, 72, dtype=torch.bfloat16))
    layers = rearrange_linears(model)
    layers["0"].release()
    layers["0"].rearrange(model[0].weight)
    layers["0"].release()
    assert not hasattr(model[0], "rearranged")


def test_other_layers_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4, dtype=torch.bfloat16))
    assert rearrange_linears(model) == {}
    assert [type(module) for module in model] == [nn.Linear, nn.Embedding]


@torch.no_grad()
def test_hooks_are_taken_over():
    model = nn.Sequential(nn.Linear(40, 72, dtype=torch.bfloat16))
    model[0].register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    model[0].register_forward_hook(lambda module, inputs, kwargs, output: output + 1, with_kwargs=True)
    inputs = torch.randn(3, 40, dtype=torch.bfloat16)
    expected = model(inputs)
    rearrange_linears(model)["0"].rearrange(model[0].weight)
    torch.testing.assert_close(model(inputs), expected)
