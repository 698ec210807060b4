"""Identity formats: the rewritten module is bit-equal with the model, and check says so when it is not."""

import pytest
import shapes
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from swalp_fx import ConvertError, passes
from swalp_fx.passes.copies import Copies
from swalp_fx.reports import check

torch.set_num_threads(2)


@pytest.mark.parametrize("kind", shapes.ALL, ids=lambda kind: kind.__name__)
def test_small_models(kind):
    model, inputs = shapes.made(kind)
    assert check(model, *inputs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 299)])
def test_networks_with_a_head_in_train_mode_only(name, size):
    model = getattr(torchvision.models, name)(num_classes=4, init_weights=False)
    assert check(model, torch.randn(2, 3, size, size))


class Wrong(nn.Module):
    """Is not the same twice."""

    turn = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        Wrong.turn += 1
        return self.layer(x) * Wrong.turn


def test_what_differs_is_told():
    found = check(Wrong(), torch.randn(2, 3))
    assert not found
    assert found.differences[0].startswith("train output 0: 6 of 6 values differ")
    assert str(found).startswith("16 of 16 tensors differ: train output 0: ")


def test_the_model_and_the_random_state_are_left_alone():
    model, inputs = shapes.made(shapes.Convnet)
    model[1].eval()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    check(model, *inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, False] + [True] * 5
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_roundings_where_a_recipe_has_them_are_compared_too(monkeypatch):
    """A write that a returned tensor misses shows only where logits are left alone."""

    class Masked(nn.Sequential):
        def forward(self, x):
            h = self[0](x)
            h[:, 0] = -1e9
            return self[1](h), h

    model = Masked(nn.Linear(3, 3), nn.Linear(3, 3))
    assert check(model, torch.randn(2, 3))
    monkeypatch.setattr(passes, "verify", lambda graph, *_, **__: graph)
    monkeypatch.setattr(Copies, "missed", lambda *_: None)
    found = check(model, torch.randn(2, 3))
    assert any(each.startswith("train output 1: 2 of 6 values differ, by at most 1e+09") for each in found.differences)


def test_a_gradient_that_is_a_sum_of_zero_may_be_summed_in_another_order():
    """The softmax's gradient sums to zero over the keys, so that of a bias that all keys share is rounding error."""

    class Encoder(nn.Module):
        def __init__(self, width=32):
            super().__init__()
            self.embed, self.query, self.key, self.value, self.head = (nn.Linear(width, width) for _ in range(5))

        def forward(self, x):
            h = self.embed(x)
            h = h + F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h))
            return self.head(h), h, self.head(h.relu())  # three gradients of h, whose order is another

    assert check(Encoder(), torch.randn(2, 5, 32))


class Keeping(nn.Linear):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last.relu()


def test_a_model_that_holds_results():
    """As attributes, which PyTorch's deepcopy refuses."""
    model, x = nn.Sequential(Keeping(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    model(x)
    assert check(model, x)
    assert model[0].last.requires_grad and model[1].weight.requires_grad


def test_a_result_that_a_hook_keeps_is_refused_with_its_remedy():
    class Kept(list):
        def __call__(self, module, inputs, output):
            self.append(output)

    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    model[0].register_forward_hook(Kept())
    model(x)
    with pytest.raises(RuntimeError, match=r"keeps the result of a computation.*keep x\.detach\(\) there"):
        check(model, x)


def test_a_sparse_gradient():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    assert check(model, torch.tensor([1, 3, 1]))


def test_what_cannot_be_rewritten_is_refused():
    with pytest.raises(ConvertError, match="then wrap the result"):
        check(nn.DataParallel(nn.Linear(2, 2)), torch.randn(1, 2))
