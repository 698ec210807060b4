"""Never float in silence, whatever is around a call or in a forward. Its products run in rewritten graphs, or the call
raises NotRewritten with the cause."""

import copy
import logging
import warnings

import pytest
import torch
from tables import crossed
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from swalp_fx import NotRewritten, check, convert
from swalp_fx.capture import backend, local

RECIPE = "bfp4[0] rounding=nearest"
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


class Products(TorchDispatchMode):
    """While it holds, counts the products of forwards: in rewritten graphs, and outside of them."""

    def __init__(self):
        super().__init__()
        self.inside = self.outside = self._depth = 0

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __enter__(self):
        local.watch = self._run
        return super().__enter__()

    def __exit__(self, *error):
        local.watch = None
        return super().__exit__(*error)

    def _run(self, made, args):
        self._depth += 1
        try:
            return made.graph_module(*args)
        finally:
            self._depth -= 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._overloadpacket in flop_registry:
            if self._depth:
                self.inside += 1
            else:
                self.outside += 1
        return function(*args, **(kwargs or {}))


def products(call, *inputs):
    """(inside, outside) of a first call and of a second."""
    found = []
    for _ in range(2):
        with Products() as counted:
            call(*inputs)
        found.append((counted.inside, counted.outside))
    return found


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.scale = 1.0

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) * self.scale


def made(kind=Net, recipe=RECIPE):
    torch.manual_seed(0)
    return convert(kind().eval(), recipe=recipe).module


@pytest.fixture
def expected():
    return made()(X)


# Around the call


def _around(context):
    def call(lp):
        with context():
            return lp(X)

    return call


def _later(call):
    def after_a_first(lp):
        lp(X)
        return call(lp)

    return after_a_first


def _disabled_around(lp):
    @torch.compiler.disable
    def call():
        return lp(X)

    return call()


def _plain_mode(lp):
    class Plain(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Plain():
        return lp(X)


def _flops(lp):
    with FlopCounterMode(display=False):
        return lp(X)


def stance(name, **more):
    return _around(lambda: torch.compiler.set_stance(name, **more))


OFF = _around(lambda: torch._dynamo.config.patch(disable=True))
RAISES = {
    "compilation off": (OFF, r"compilation is switched off .*config.disable\); switch it on"),
    "force_eager": (stance("force_eager"), r"set_stance\('force_eager'\) runs the original code; use the default"),
    "force_eager, later": (_later(stance("force_eager")), r"set_stance\('force_eager'\)"),
    "eager_on_recompile": (stance("eager_on_recompile"), r"set_stance\('eager_on_recompile'\)"),
    "eager_then_compile": (stance("eager_then_compile"), r"set_stance\('eager_then_compile'\)"),
    "jit.trace": (lambda lp: torch.jit.trace(lp, X)(X), "^torch.jit.trace would keep the float code of Net; call it"),
    "symbolic_trace": (lambda lp: torch.fx.symbolic_trace(lp)(X), "of a converted Net leaves the code between its"),
    "symbolic_trace around": (
        lambda lp: torch.fx.symbolic_trace(nn.Sequential(lp))(X),
        "^torch.fx.symbolic_trace, or make_fx, would keep the float code of Net",
    ),
    "make_fx": (lambda lp: make_fx(lp)(X)(X), "or make_fx, would keep the float code of Net"),
    "export": (lambda lp: torch.export.export(lp, (X,)).module()(X), "torch.export runs the original code; export the"),
    "a dispatch mode": (_plain_mode, "dispatch mode"),
    "counting flops": (_flops, "dispatch mode"),
    "grad": (lambda lp: torch.func.grad(lambda x: lp(x).sum())(X), "torch.func is around the call; use torch.autograd"),
    "vmap": (lambda lp: torch.func.vmap(lp)(X), "torch.func is around the call"),
    "jacrev": (lambda lp: torch.func.jacrev(lp)(X[0]), "torch.func is around the call"),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("case", RAISES)
def test_what_would_make_it_float_is_refused_with_its_cause_and_nothing_stays_of_it(case, expected):
    call, message = RAISES[case]
    lp = made()
    with pytest.raises(NotRewritten, match=message) as failure:
        call(lp)
    assert "\n" not in str(failure.value) and len(str(failure.value)) < 300
    assert torch.equal(lp(X), expected)


@pytest.mark.parametrize("inside", ["export", "grad"])
def test_what_traces_around_it_is_refused_by_the_front_end_in_our_words(inside, expected):
    lp = made()
    with pytest.raises(Exception, match="around the converted model would drop its rewrite"):
        if inside == "export":
            torch.export.export(lp, (X,), strict=True)
        else:
            torch.compile(torch.func.grad(lambda x: lp(x).sum()), backend="eager", fullgraph=True)(X)
    assert torch.equal(lp(X), expected)


def _frozen(call):
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        return call()


class Tanh(torch.optim.Optimizer):
    """An optimizer whose step another compiler traces with the code around it."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(torch.tanh(parameter.grad), alpha=-0.1)


def _compiled_with_a_step(lp):
    optimizer = Tanh(lp.parameters())
    for parameter in lp.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def train():
        optimizer.step()
        return lp(X)

    return torch.compile(train, backend="eager")()


CONSTANTS = {
    "frozen": lambda lp: _frozen(lambda: torch.compile(lp, backend="eager")(X)),
    "frozen around": lambda lp: _frozen(lambda: torch.compile(lambda x: lp(x) * 1, backend="eager")(X)),
    "with a step": _compiled_with_a_step,
}


@pytest.mark.filterwarnings("ignore:.*record_function")
@pytest.mark.parametrize("case", CONSTANTS)
def test_a_weight_that_is_a_constant_of_anothers_graph_is_refused(case, expected):
    with pytest.raises(Exception, match=r"NotRewritten: parameter first\.weight would stay in float, since the graph"):
        CONSTANTS[case](made())
    assert CONSTANTS[case](made(recipe="float")).shape == expected.shape


STAYS = {
    "compilation off, later": _later(OFF),
    "disabled": lambda lp: torch.compiler.disable(lp)(X),
    "disabled around": _disabled_around,
    "disabled around, later": _later(_disabled_around),
    "another backend by force": _later(stance("default", force_backend="eager")),
    "no gradients": _around(torch.no_grad),
    "inference mode": _around(torch.inference_mode),
    "an audit": _around(Products),
    "a checkpoint": lambda lp: checkpoint(lp, X, use_reentrant=False),
    "a reentrant checkpoint": lambda lp: checkpoint(lp, X.clone().requires_grad_(), use_reentrant=True),
    "saved tensors elsewhere": _around(torch.autograd.graph.save_on_cpu),
    "compiled": lambda lp: torch.compile(lp, backend="eager")(X),
    "compiled around": lambda lp: torch.compile(lambda x: lp(x) * 1, backend="eager", fullgraph=True)(X),
    "parameters frozen into graphs": lambda lp: _frozen(lambda: lp(X)),
    "parameters installed in graphs": _around(lambda: torch._dynamo.config.patch(install_free_tensors=True)),
    "compiled, tracing errors hidden": _around(lambda: torch._dynamo.config.patch(suppress_errors=True)),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_changes_nothing_keeps_the_bits(case, expected):
    assert torch.equal(STAYS[case](made()), expected)
    assert torch.equal(STAYS[case](_after(made())), expected)


def _after(lp):
    lp(X)
    return lp


@pytest.mark.parametrize("suppressed", [False, True])
def test_an_error_of_a_pass_is_raised(monkeypatch, suppressed, expected):
    lp = made()
    with monkeypatch.context() as patched, torch._dynamo.config.patch(suppress_errors=suppressed):
        patched.setattr(backend, "rewrite", lambda *_, **__: 1 / 0)
        with pytest.raises(Exception, match="division by zero"):
            lp(X)
    assert torch.equal(lp(X), expected)


# Reads of a forward


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.name = nn.Linear(8, 2), ""

    def forward(self, x):
        return self.layer(x) if self.name else -self.layer(x)


def test_past_64_graphs_of_a_text_that_always_changes_they_are_made_anew_with_a_warning():
    torch.manual_seed(0)
    model = Named()
    lp = convert(copy.deepcopy(model), recipe="float").module
    with pytest.warns(UserWarning, match="more than 64 graphs, since a value that its Python reads keeps changing"):
        for i in range(70):
            lp.name = model.name = "x" * i
            assert torch.equal(lp(X), model(X))
    assert len(lp.graphs) == 6


class Counts(Net):
    calls = 0

    def forward(self, x):
        return super().forward(x) * self.calls


@pytest.mark.parametrize("attribute", ["scale", "calls"])
def test_a_number_that_always_changes_is_followed_by_a_few_graphs(attribute):
    torch.manual_seed(0)
    model = Counts()
    lp = convert(copy.deepcopy(model), recipe="float").module
    for i in range(80):
        for each in (model, lp):
            setattr(each, attribute, i / 8 if attribute == "scale" else i)
        assert torch.equal(lp(X), model(X))
    assert len(lp.graphs) <= 4


# Breaks


def _print(y):
    print(end="")
    return y


def _log(y):
    logging.getLogger("a model").warning("shape %s", y.shape)
    return y


def _item(y):
    return y * 2 if y.sum().item() > -1e9 else y


def _numpy(y):
    scale = float(y.detach().numpy().max() > -1e9) + 1
    return y * scale


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.second(self.between(torch.relu(self.first(x))))

    def between(self, y):
        return y


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Sequence(Loop):
    def forward(self, x):
        return self.head(self.blocks(x))


class Finally(Loop):
    def forward(self, x):
        try:
            return self.head(self.blocks(x))
        finally:
            self.done = True


BREAKS = {"print": (_print, 1), "logging": (_log, 1), "item": (_item, 2), "numpy": (_numpy, 2)}


@pytest.mark.filterwarnings("ignore:.*Graph break")
@pytest.mark.parametrize(
    ("reason", "kind"), crossed(BREAKS, [Loop, Sequence, Finally]), ids=lambda each: getattr(each, "__name__", each)
)
def test_what_breaks_a_graph_leaves_no_product_outside_and_changes_no_bit(monkeypatch, reason, kind):
    between, factor = BREAKS[reason]
    whole, broken = made(kind), made(kind)
    monkeypatch.setattr(Block, "between", lambda self, y: y * factor)
    due = whole(X)
    monkeypatch.setattr(Block, "between", lambda self, y: between(y))
    assert products(broken, X) == [(5, 0)] * 2
    assert torch.equal(broken(X), due)


class Checkpointed(Loop):
    reentrant = False

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class Reentrant(Checkpointed):
    reentrant = True


@pytest.mark.parametrize("kind", [Checkpointed, Reentrant], ids=lambda kind: kind.__name__)
def test_products_of_a_checkpoint_are_inside(kind):
    x = X.clone().requires_grad_()
    assert products(made(kind), x) == [(5, 0)] * 2
    assert torch.equal(made(kind)(x), made(Loop)(x))


# Hooks


def hooks(register):
    def hooked(lp):
        for each in (lp, lp.blocks[0], lp.blocks[1].first):
            register(each)
        return lp

    return hooked


HOOKS = {
    "forward": hooks(lambda module: module.register_forward_hook(lambda _, x, y: y * 2)),
    "before forward": hooks(lambda module: module.register_forward_pre_hook(lambda _, x: (x[0] * 2,))),
    "backward": hooks(lambda module: module.register_full_backward_hook(lambda *_: None)),
    "before backward": hooks(lambda module: module.register_full_backward_pre_hook(lambda *_: None)),
}


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_run_and_leave_no_product_outside(hook, late):
    torch.manual_seed(0)
    model = Loop()
    lp = convert(copy.deepcopy(model), recipe="float W=bfp8 A=bfp8 rounding=nearest").module
    if late:
        lp(X)
    hooked = HOOKS[hook](lp)
    x = X.clone().requires_grad_()
    assert products(hooked, x) == [(5, 0)] * 2
    assert (hooked(x) - HOOKS[hook](model)(x)).abs().max() < 0.1


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_are_there_before_change_nothing_under_identity_formats(hook):
    assert check(HOOKS[hook](Loop()), X)


def test_a_backward_hook_on_a_child_is_given_the_gradients():
    seen = []
    for converted in (False, True):
        torch.manual_seed(0)
        model = Loop()
        if converted:
            convert(model, recipe="float")
        model.blocks[0].register_full_backward_hook(lambda _, x, y: seen.append((*x, *y)))
        model(X.clone().requires_grad_()).sum().backward()
    assert len(seen) == 2 and all(map(torch.equal, *seen))


def test_a_warning_of_a_break_is_none_of_ours():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(Finally)(X)
