"""The converted model as a citizen of PyTorch: copied, stored, moved, compiled, checkpointed as the model was."""

import copy
import io
import pickle
import re
import threading

import pytest
import shapes
import torch
import torch.nn.functional as F
from shapes import equal, run
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from swalp_fx import NotRewritten, Recipe, Rule, check, convert, in_float, quantize
from swalp_fx.capture import conversion_of

kinds = pytest.mark.parametrize("kind", shapes.ALL, ids=lambda kind: kind.__name__)
NEAREST = "bfp6[0] rounding=nearest"


def converted(kind, recipe="bfp6[0]"):
    """(module, inputs), the same each time."""
    model, inputs = shapes.made(kind)
    return convert(model, recipe=recipe).module, inputs


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@kinds
def test_keys_and_tensors_are_the_models(kind):
    model, _ = shapes.made(kind)
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    module, _ = convert(model)
    assert {name: value.data_ptr() for name, value in module.state_dict().items()} == before
    assert list(module.state_dict()) == list(before)
    assert [*map(id, module.parameters())] == [*map(id, model.parameters())]
    assert [name for name, _ in module.named_modules()] == [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("kind", [shapes.Convnet, shapes.Tied, shapes.Recurrent], ids=lambda kind: kind.__name__)
def test_copies_and_pickles_compute_the_same(kind):
    module, _ = convert(shapes.made(kind)[0], recipe="bfp6[0]")
    _, inputs = shapes.made(kind)
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(stored, weights_only=False)]
    for training in (False, True):
        for each in (module, *others):
            each.train(training)
        before = [copy.deepcopy(each) for each in others]
        expected = run(copy.deepcopy(module), inputs)
        with in_float(module):
            assert not equal(run(copy.deepcopy(module), inputs), expected)
        for other in before:
            assert type(other) is kind and conversion_of(other).root is other
            assert list(other.state_dict()) == list(module.state_dict())
            assert equal(run(other, inputs), expected)


def _saved_and_loaded(module):
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": _saved_and_loaded,
    "in a list": lambda module: copy.deepcopy([module, module])[1],
    "in another module": lambda module: pickle.loads(pickle.dumps(nn.Sequential(module)))[0],
}


@pytest.mark.parametrize("called", [False, True], ids=["", "called"])
@pytest.mark.parametrize("way", COPIES)
def test_a_child_that_is_copied_is_a_converted_model_of_its_own(way, called):
    rules = (Rule("blocks.1.conv2", weight="float"), Rule("conv1", weight="float"))
    module, inputs = converted(shapes.PreResNet, Recipe.parse(NEAREST, rules=rules))
    module.eval()
    if called:
        module(*inputs)
    block, y = module.blocks[1], torch.randn(2, 4, 8, 8)
    copied = COPIES[way](block)
    assert torch.equal(copied(y), block(y))
    assert conversion_of(copied).root is copied and conversion_of(copied.conv2) is conversion_of(copied)
    weights = re.findall(r"= swalp_fx_quantize_weight\((\w+),", str(copied.graphs))
    assert "conv1_weight" in weights and "conv2_weight" not in weights
    with in_float(copied), in_float(module):
        assert torch.equal(copied(y), block(y))
    assert len(pickle.dumps(block)) < 0.6 * len(pickle.dumps(module))  # without the rest of the model


def test_what_is_copied_with_its_model_stays_part_of_it():
    module, inputs = converted(shapes.PreResNet, NEAREST)
    for copied, block in (copy.deepcopy([module, module.blocks[1]]), copy.deepcopy([module.blocks[1], module])[::-1]):
        assert block is copied.blocks[1] and conversion_of(block).root is copied
        assert not hasattr(block, "graphs") and copied.graphs is conversion_of(copied).graphs
        copied(*inputs)
        assert len(copied.graphs) == 1


def _of_a_child(child, x, queue):
    queue.put(child(x).detach().numpy())


def test_a_child_computes_the_same_in_a_process_that_is_spawned():
    module, _ = converted(shapes.Tied, NEAREST)
    spawn = torch.multiprocessing.get_context("spawn")
    queue, x = spawn.Queue(), torch.randn(2, 6)
    process = spawn.Process(target=_of_a_child, args=(module.second, x, queue))
    process.start()
    found = torch.from_numpy(queue.get(timeout=120))
    process.join()
    assert torch.equal(found, module.second(x))


def test_a_shallow_copy_is_refused_when_it_is_called():
    """Its methods would be bound to the model."""
    module, inputs = converted(shapes.Tied, NEAREST)
    module.first.register_forward_hook(lambda *_: None)
    shallow = copy.copy(module)
    for child in (shallow, copy.copy(module.first)):
        with pytest.raises(NotRewritten, match=r"a shallow copy of a converted .*; use copy.deepcopy"):
            child(*inputs)
    with in_float(module):
        assert torch.equal(copy.copy(module)(*inputs), module(*inputs))
    assert torch.equal(copy.deepcopy(module)(*inputs), module(*inputs))


def test_a_copy_shares_nothing():
    module, _ = convert(shapes.Tied())
    deep = copy.deepcopy(module)
    assert {*map(id, deep.parameters())}.isdisjoint(map(id, module.parameters()))
    assert deep.first.weight is deep.second.weight
    assert conversion_of(deep) is not conversion_of(module)


def test_state_round_trips_with_the_float_model():
    model, _ = shapes.made(shapes.Convnet)
    module, _ = convert(shapes.Convnet())
    module.load_state_dict(model.state_dict())
    assert equal(module.state_dict(), model.state_dict())
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    restored = shapes.Convnet()
    restored.load_state_dict(torch.load(stored, weights_only=True))
    assert equal(restored.state_dict(), model.state_dict())


def test_the_training_flag_is_the_models():
    module, _ = convert(shapes.Droops())
    for mode in (False, True, False):
        module.train(mode)
        assert all(each.training == mode for each in module.modules())


def test_a_hook_on_the_module_runs_in_each_call():
    model, inputs = shapes.made(shapes.Convnet)
    module, _ = convert(model)
    seen = []
    module.register_forward_hook(lambda *_: seen.append(1))
    module(*inputs)
    module(*inputs)
    assert seen == [1, 1]


def test_conversion_adds_no_key():
    model, inputs = shapes.made(shapes.Branchy)
    before = list(model.state_dict())
    module, _ = convert(model, example_inputs=tuple(inputs))
    assert list(module.state_dict()) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_model_of_any_dtype_may_be_converted_and_a_module_moved_to_it(dtype):
    model, (x,) = shapes.made(shapes.Tied)
    moved = convert(copy.deepcopy(model)).module
    moved(x)
    moved.to(dtype)
    assert moved.first.weight.dtype == dtype
    model.to(dtype)
    assert check(model, x.to(dtype))
    y = run(moved, [x.to(dtype)])
    assert y.dtype == dtype
    assert torch.equal(y, run(convert(model).module, [x.to(dtype)]))


def test_it_moves_between_devices_with_the_model():
    model, (x,) = shapes.made(shapes.PreResNet)
    module, _ = convert(model)
    expected = module.eval()(x)
    state = copy.deepcopy(model.state_dict())
    module.to("meta")
    assert model.conv1.weight.device.type == module(x.to("meta")).device.type == "meta"
    module.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(module(x), expected)


def test_autocast_casts_the_rounded_weights():
    model, x = nn.Linear(6, 4), torch.randn(2, 6)
    module, _ = convert(model, recipe="W=bfp4 rounding=nearest")
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        expected = F.linear(x, quantize(model.weight, "bfp4"), quantize(model.bias, "bfp4"))
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.sum().backward()
    assert model.weight.grad.dtype == torch.float32


def test_autocast_around_the_call_keeps_the_bits():
    model, inputs = shapes.made(shapes.Convnet)
    with torch.autocast("cpu", torch.bfloat16):
        assert check(model, *inputs)


def test_channels_last_in_channels_last_out_and_the_same_numbers():
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3))
        return convert(model, recipe="bfp4 rounding=nearest").module

    x = quantize(torch.randn(2, 3, 8, 8), "bfp4")  # sums of 4-bit products are exact in any order
    plain, last = made(), made().to(memory_format=torch.channels_last)
    expected, found = plain(x), last(x.to(memory_format=torch.channels_last))
    assert expected.is_contiguous() and found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, expected)
    error = quantize(torch.randn(expected.shape), "bfp4")
    expected.backward(error)
    found.backward(error)
    assert equal(gradients(last), gradients(plain))


def test_layers_frozen_after_the_conversion_stay_as_they_are():
    model, inputs = shapes.made(shapes.PreResNet)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    module, _ = convert(model, optimizer, recipe=NEAREST)
    run(module, inputs).sum().backward()
    expected = copy.deepcopy(gradients(module))
    optimizer.zero_grad()
    model.conv1.requires_grad_(False)
    before = model.conv1.weight.clone()
    run(module, inputs).sum().backward()
    del expected["conv1.weight"]
    assert equal({name: grad for name, grad in gradients(module).items() if grad is not None}, expected)
    optimizer.step()
    assert torch.equal(model.conv1.weight, before)
    model.conv1.requires_grad_(True)
    run(module, inputs).sum().backward()
    assert model.conv1.weight.grad is not None


def test_accumulated_gradients_are_rounded_once():
    model, (x,) = shapes.made(shapes.Tied)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    module, _ = convert(model, optimizer, recipe=NEAREST)
    sums = dict.fromkeys(gradients(module), 0)
    for batch in (x, -2 * x):
        each = torch.autograd.grad(module(batch).square().sum(), [*module.parameters()])
        sums = {name: total + grad for (name, total), grad in zip(sums.items(), each, strict=True)}
        module(batch).square().sum().backward()
    assert equal(gradients(module), sums)
    optimizer.step()
    assert equal(gradients(module), {name: quantize(total, "bfp6[0]") for name, total in sums.items()})


def test_micro_batches_do_not_share_their_random_bits():
    module, inputs = converted(shapes.Tied, "bfp4")
    assert not torch.equal(module(*inputs), module(*inputs))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", [shapes.Tied, shapes.Droops], ids=lambda kind: kind.__name__)
def test_checkpointing_redraws_the_same_bits(kind, reentrant):
    module, (x,) = converted(kind, "bfp4[0]")
    x.requires_grad_()
    found = []
    for call in (module, lambda x: checkpoint(module, x, use_reentrant=reentrant)):
        module.zero_grad()
        x.grad = None
        run(call, [x]).square().sum().backward()
        found.append([x.grad, *gradients(module).values()])
    assert equal(*found)


@pytest.mark.parametrize("kind", [shapes.PreResNet, shapes.Tied, shapes.Direct], ids=lambda kind: kind.__name__)
def test_functional_call_computes_with_the_parameters_given(kind):
    module, inputs = converted(kind, NEAREST)
    own = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    given = {name: torch.randn_like(parameter).requires_grad_() for name, parameter in own.items()}
    y = torch.func.functional_call(module, given, tuple(inputs))
    y.sum().backward()
    assert equal(dict(module.named_parameters()), own) and not any(p.grad is not None for p in module.parameters())
    module.load_state_dict(given, strict=False)
    expected = module(*inputs)
    expected.sum().backward()
    assert torch.equal(y, expected)
    assert equal({name: parameter.grad for name, parameter in given.items()}, gradients(module))


def test_a_gradient_of_the_gradient_goes_through():
    module, (x,) = converted(shapes.Tied, NEAREST)
    (gradient,) = torch.autograd.grad(module(x.requires_grad_()).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert all(grad is not None for name, grad in gradients(module).items() if name != "second.bias")


class Checkpointing(shapes.Droops):
    reentrant = False

    def block(self, layer, x):
        return F.dropout(F.gelu(layer(x)), 0.5, self.training)

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(self.block, layer, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_checkpoints_has_the_gradients_of_one_that_does_not(reentrant, monkeypatch):
    monkeypatch.setattr(Checkpointing, "reentrant", reentrant)
    found = []
    for kind in (shapes.Droops, Checkpointing):
        module, (x,) = converted(kind, "float")
        y = run(module, [x.requires_grad_()], seed=3)
        y.square().sum().backward()
        found.append([y, x.grad, *gradients(module).values()])
    assert equal(*found)


@pytest.mark.parametrize("kind", [shapes.Convnet, shapes.Tied, shapes.Direct], ids=lambda kind: kind.__name__)
def test_it_compiles_whole(kind):
    module, inputs = converted(kind, NEAREST)
    module.eval()
    found = []
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        y = call(*inputs)
        y.sum().backward()
        found.append([y, *gradients(module).values()])
    assert equal(*found)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_trains_with_the_same_bits(backend):
    found = []
    for compiled in (False, True):
        module, inputs = converted(shapes.Tied, "bfp4[0]")
        call = torch.compile(module, fullgraph=True, backend=backend) if compiled else module
        outputs = []
        for seed in (1, 2):
            y = run(call, inputs, seed)
            y.sum().backward()
            outputs.append(y)
        assert not torch.equal(*outputs)
        found.append([*outputs, *gradients(module).values()])
    assert equal(*found)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_loss_around_it_compiles_with_the_same_bits(backend):
    found = []
    for compiled in (False, True):
        module, (x,) = converted(shapes.Tied, "bfp4[0]")

        def loss(x, module=module):
            return F.mse_loss(module(x) * 2, x)

        value = run(torch.compile(loss, fullgraph=True, backend=backend) if compiled else loss, [x])
        value.backward()
        found.append([value, *gradients(module).values()])
    assert equal(*found)


@pytest.mark.parametrize("in_place", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_it_takes_the_same_steps(in_place):
    states = []
    for compiled in (False, True):
        model, inputs = shapes.made(shapes.PreResNet)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        module, swalp = convert(model, optimizer, recipe=NEAREST)
        if compiled and in_place:
            module.compile(fullgraph=True, backend="aot_eager")
        elif compiled:
            module = torch.compile(module, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            optimizer.zero_grad()
            module(*inputs).square().mean().backward()
            optimizer.step()
            swalp.update_average()
        states.append([dict(model.state_dict()), swalp.state_dict()["average"]])
    assert equal(*states)


def test_compiled_it_draws_anew_in_each_forward():
    module, inputs = converted(shapes.Tied, "bfp4")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(compiled, inputs, 1), run(compiled, inputs, 1))
    assert not torch.equal(run(compiled, inputs, 1), run(compiled, inputs, 2))
    assert torch.equal(compiled.eval()(*inputs), compiled(*inputs))


def test_threads_share_it():
    module, inputs = converted(shapes.Tied)
    expected = module.eval()(*inputs)
    module, wrong = copy.deepcopy(module), []  # which has no graph yet
    own = [*module.parameters()]

    def forwards():
        for _ in range(5):
            wrong.extend([] if torch.equal(module(*inputs), expected) else [1])

    threads = [threading.Thread(target=forwards) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and module.graphs
    assert [*map(id, module.parameters())] == [*map(id, own)]


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", [lambda module: DistributedDataParallel(module, bucket_cap_mb=1e-4), nn.DataParallel])
def test_wrapped_for_several_devices_it_has_the_same_bits_and_one_graph(wrap):
    device = "cuda" if torch.cuda.is_available() else "cpu"  # DataParallel takes a model to the first GPU there is
    found = []
    for wrapped in (False, True):
        module, inputs = converted(shapes.Tied, "bfp4[0]")
        module, inputs = module.to(device), [each.to(device) for each in inputs]
        y = run(wrap(module) if wrapped else module, inputs)
        y.square().sum().backward()
        found.append([y, *gradients(module).values()])
        assert len(module.graphs) == 1
    assert equal(*found)
