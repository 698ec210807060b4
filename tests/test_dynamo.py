"""Each private name of torch that the capture uses still works as it needs, in the installed torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config
from torch.func import functional_call

from swalp_fx.capture import dynamo
from swalp_fx.capture.dynamo import Frame


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def traced(
    function: Callable[..., Any], look: Callable[[Frame, Any, Any], Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """``function`` compiled by a backend that runs each graph as it is, and the results of ``look`` for each graph."""
    seen: list[Any] = []

    def backend(graph_module: Any, inputs: Any) -> Any:
        seen.append(look(Frame(), graph_module, inputs))
        return graph_module.forward

    return dynamo.compiled(function, backend, lambda callback: callback), seen


def around(trace: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper that traces each frame by ``trace(callback, frame, ...)``."""

    class Around:
        def __init__(self, callback: Callable[..., Any]) -> None:
            self._callback = callback
            self._torchdynamo_orig_backend = callback._torchdynamo_orig_backend

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return trace(self._callback, *args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(vars(self)["_callback"], name)

    return Around


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.factor = 2
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.mean(0)
        return self.fc(x) * self.factor


X = torch.ones(2, 3)


@pytest.mark.parametrize("name", dynamo.KNOBS)
def test_a_knob_is_a_setting_of_this_torch(name: str) -> None:
    before = getattr(config, name)
    with dynamo.knobs():
        assert getattr(config, name) == dynamo.KNOBS[name]
    assert getattr(config, name) == before


def test_knobs_keep_parameters_inputs_of_a_graph() -> None:
    model = nn.Linear(3, 3)
    names = []
    for frozen in (True, False):
        torch._dynamo.reset()
        run, seen = traced(model.forward, lambda frame, graph_module, inputs: len(inputs))
        with torch._inductor.config.patch(freezing=True), torch.no_grad():
            if frozen:
                run(X)
            else:
                with dynamo.knobs():
                    run(X)
        names += seen
    assert names == [1, 3]


def test_a_function_that_is_traced_apart_ends_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def inner(x: Tensor) -> Tensor:
        return x * 3

    def outer(x: Tensor) -> Tensor:
        return inner(x + 1) + 1

    holds = [True]
    kind = dynamo.InliningInstructionTranslator
    monkeypatch.setattr(kind, "check_inlineable", staticmethod(kind.check_inlineable))
    dynamo.trace_apart(inner, "as a test", lambda: holds[0])
    for apart, graphs in ((True, 3), (False, 1)):
        torch._dynamo.reset()
        holds[0] = apart
        run, seen = traced(outer, lambda frame, graph_module, inputs: dynamo.break_reason(graph_module))
        assert torch.equal(run(X), X * 3 + 4)
        assert len(seen) == graphs and ("as a test" in str(seen[0])) == apart


def test_around_sees_the_tracing_of_a_frame_and_not_a_hit() -> None:
    frames = []

    def trace(callback: Callable[..., Any], frame: Any, *args: Any, **kwargs: Any) -> Any:
        result = callback(frame, *args, **kwargs)
        if result.guarded_code is not None:  # none: it runs as Python
            frames.append(frame.f_code.co_name)
        return result

    def double(x: Tensor) -> Tensor:
        return x * 2

    run = dynamo.compiled(double, lambda graph_module, inputs: graph_module.forward, around(trace))
    run(X), run(X)
    assert frames == ["double"]


def test_the_backend_is_given_the_parameters_themselves() -> None:
    model = Mean()
    run, seen = traced(model.forward, lambda frame, graph_module, inputs: [id(each) for each in inputs])
    read = {id(model.fc.weight), id(model.fc.bias), id(model.mean)}
    run(X)
    assert read <= set(seen[0])


def test_a_node_has_the_call_of_the_module_around_it() -> None:
    model = Mean()

    def look(frame: Frame, graph_module: Any, inputs: Any) -> Any:
        node = next(node for node in graph_module.graph.nodes if "linear" in str(node.target))
        return list(node.meta["nn_module_stack"])[-1].partition("@")[0]

    run, seen = traced(model.__call__, look)
    run(X)
    assert seen == [str(id(model.fc))]


def test_the_code_behind_a_break_knows_whose_it_is() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        print(end="")
        return x * 2

    def look(frame: Frame, graph_module: Any, inputs: Any) -> Any:
        return frame.original_code.co_name, frame.code.co_name[:12], dynamo.break_reason(graph_module) is not None

    run, seen = traced(broken, look)
    run(X)
    assert seen == [("broken", "broken", True), ("broken", "torch_dynamo", False)]


def test_modules_are_locals_and_what_a_closure_holds() -> None:
    held = Mean()

    def of_closure(module: nn.Module, x: Tensor) -> Tensor:
        return held(x) + module(x)

    run, seen = traced(of_closure, lambda frame, *_: dict(frame.modules()))
    other = Mean()
    run(other, X)
    assert seen == [{"module": other, "held": held}]


@pytest.mark.parametrize("guarded", [True, False])
def test_guard_identity_makes_a_graph_for_each_object(guarded: bool) -> None:
    def call(module: nn.Module, x: Tensor) -> Tensor:
        return x + 1 if module else x

    run, seen = traced(call, lambda frame, *_: frame.guard_identity("module") if guarded else None)
    for module in (nn.ReLU(), nn.ReLU()):
        run(module, X)
    assert len(seen) == (2 if guarded else 1)


@pytest.mark.parametrize("guarded", [True, False])
def test_guard_attribute_makes_a_graph_for_each_value(guarded: bool) -> None:
    def call(module: Any, x: Tensor) -> Tensor:
        return module[0](x)

    run, seen = traced(call, lambda frame, *_: frame.guard_attribute("module", "inner", "flag") if guarded else None)
    module = nn.Sequential(nn.ReLU())
    vars(module)["inner"] = inner = nn.ReLU()
    for flag in (True, False, True):
        vars(inner)["flag"] = flag
        run(module, X)
    assert len(seen) == (2 if guarded else 1)


def hooked(of_all: bool) -> Any:
    if of_all:
        return torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    return INNER.register_forward_pre_hook(lambda *_: None)


INNER = nn.ReLU()
ASKED: list[Any] = []


@dynamo.assume_constant_result
def ask() -> bool:
    inner = Frame().inner
    ASKED.append((inner.module, inner.has_hooks()))
    inner.guard("training")
    return True


class Asking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return method(INNER, x)


def method(self: nn.Module, x: Tensor) -> Tensor:
    return self(x) if ask() else x


@pytest.mark.parametrize("of_all", [False, True])
def test_the_module_whose_method_is_inlined_and_its_hooks_are_guarded(of_all: bool) -> None:
    run, seen = traced(Asking().forward, lambda *_: None)
    ASKED.clear()
    with dynamo.knobs():
        run(X), run(X)
        hook = hooked(of_all)
        run(X)
    hook.remove()
    assert ASKED == [(INNER, False), (INNER, True)]
    assert len(seen) == 2


def test_an_attribute_of_the_module_whose_method_is_inlined_is_guarded() -> None:
    run, seen = traced(Asking().forward, lambda *_: None)
    for mode in (True, True, False):
        run(X) if INNER.train(mode) else None
    INNER.train()
    assert len(seen) == 2


@dynamo.assume_constant_result
def note_setting() -> bool:
    ASKED.append(Frame().inner.is_set("flag"))
    return True


def test_an_attribute_that_the_trace_has_set_is_known() -> None:
    def asks(self: nn.Module, x: Tensor) -> Tensor:
        return x + 1 if note_setting() else x

    def sets(x: Tensor) -> Tensor:
        x = asks(INNER, x)
        INNER.flag = True
        return asks(INNER, x)

    run, _ = traced(sets, lambda *_: None)
    ASKED.clear()
    run(X)
    assert ASKED == [False, True] and INNER.flag


@dynamo.assume_constant_result
def stand() -> bool:
    Frame().inner.stand_in()
    return True


def test_what_a_method_makes_stands_in_its_module() -> None:
    def method(self: nn.Module, x: Tensor) -> Tensor:
        return torch.tanh(x) if stand() else x

    def look(frame: Frame, graph_module: Any, inputs: Any) -> Any:
        nodes = {node.name: node for node in graph_module.graph.nodes}
        return [list(nodes[name].meta.get("nn_module_stack", {})) for name in ("tanh", "tanh_1", "outside")]

    def caller(x: Tensor) -> Tensor:
        outside = torch.exp(method(INNER, method(INNER, x)))
        return outside

    run, seen = traced(caller, look)
    run(X)
    assert seen == [[[f"{id(INNER)}@method0"], [f"{id(INNER)}@method1"], []]]


class Standing(nn.Module):
    """Its forward is a method that says so, as an entry's is."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if stand() else x


@pytest.mark.parametrize("of_all", [False, True])
def test_a_hook_of_a_module_and_its_forward_are_told_apart(of_all: bool) -> None:
    model, register = Standing(), nn.modules.module.register_module_forward_hook

    def hook(module: nn.Module, given: Any, result: Tensor) -> Tensor:
        return torch.exp(result)

    def look(frame: Frame, graph_module: Any, inputs: Any) -> Any:
        nodes = {node.target: node for node in graph_module.graph.nodes}
        stacks = [list(nodes[each].meta["nn_module_stack"]) for each in (torch.tanh, torch.exp)]
        return stacks, frame.runs_call, dynamo.is_hooked(model), hook.__code__ in dynamo.hooks_code(model)

    assert not dynamo.is_hooked(model) and hook.__code__ not in dynamo.hooks_code(model)
    handle = register(hook) if of_all else model.register_forward_hook(hook)
    run, seen = traced(lambda x: model(x), look)
    run(X)
    handle.remove()
    key = str(id(model))
    assert seen == [([[key, f"{key}@method1"], [key]], False, True, True)]


def _calling(call: Any, model: nn.Module) -> Any:
    return lambda x: call(model, x)


def test_a_frame_knows_whether_it_runs_the_call_of_a_module() -> None:
    model = Mean()
    for call, runs_call in ((dynamo.call_of_module, True), (Mean.forward, False)):
        run, seen = traced(_calling(call, model), lambda frame, *_: frame.runs_call)
        run(X)
        assert seen == [runs_call]


def test_a_frame_that_is_left_runs_as_python_and_is_asked_again() -> None:
    asked = []

    def trace(callback: Callable[..., Any], frame: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(frame.f_code.co_name)
        return dynamo.LEFT

    def double(x: Tensor) -> Tensor:
        return x * 2

    run = dynamo.compiled(double, lambda graph_module, inputs: graph_module.forward, around(trace))
    assert torch.equal(run(X), 2 * X) and torch.equal(run(X), 2 * X)
    assert asked.count("double") == 2


@dynamo.assume_constant_result
def note_call() -> bool:
    ASKED.append(Frame().is_inside(dynamo.functional_call))
    return True


def test_functional_call_is_known_around_what_it_calls() -> None:
    class Noting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if note_call() else x

    model = Noting(3, 3)
    run, _ = traced(lambda x: model(x) + functional_call(model, {"bias": torch.ones(3)}, (x,)), lambda *_: None)
    ASKED.clear()
    run(X)
    assert ASKED == [False, True]


def test_code_that_is_skipped_is_inlined_and_has_no_graph_of_its_own() -> None:
    def skipped(x: Tensor) -> Tensor:
        return x * 2

    dynamo.skip_code(skipped.__code__)
    run, seen = traced(skipped, lambda frame, *_: frame.code.co_name)
    assert torch.equal(run(X), 2 * X) and not seen
    run, seen = traced(lambda x: skipped(x), lambda frame, *_: frame.code.co_name)
    assert torch.equal(run(X), 2 * X) and seen == ["<lambda>"]


def test_buffers_set_are_known_by_their_nodes_and_one_that_is_not_read_is_no_input() -> None:
    def look(frame: Frame, graph_module: Any, inputs: Any) -> Any:
        names, graph = frame.buffers_set(), graph_module.graph
        return [str(each.target) for each in graph.nodes if each.name in names], len(graph.find_nodes(op="placeholder"))

    model = Mean()
    model.register_buffer("unread", torch.zeros(3))
    run, seen = traced(model.forward, look)
    run(X)
    assert seen == [(["<built-in function add>"], 4)]


def test_a_tensor_in_a_parameters_place_has_its_slot() -> None:
    model = nn.Sequential(nn.Linear(3, 3))

    given = {"0.weight": torch.ones(3, 3), "0.bias": torch.ones(3)}

    def look(frame: Frame, graph_module: Any, inputs: Any) -> Any:
        return [frame.parameter_slot(node) for node in graph_module.graph.find_nodes(op="placeholder")]

    run, seen = traced(model.forward, look)
    functional_call(_Runs(model, run), {f"model.{name}": tensor for name, tensor in given.items()}, (X,))
    slots = [slot for slot in seen[0] if slot is not None]
    assert slots == [(model[0], "weight"), (model[0], "bias")]


def test_the_tensors_that_an_entry_is_given_are_known() -> None:
    def entry(*args: Any, **kwargs: Any) -> Tensor:
        return args[0][0] + kwargs["y"] + weight

    weight, y = torch.ones(3), torch.ones(3)
    run, seen = traced(entry, lambda frame, *_: frame.given())
    run([X], y=y)
    assert seen == [{id(X), id(y)}]


class _Runs(nn.Module):
    """Calls a compiled forward of the model that it holds."""

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def test_a_backend_can_be_put_in_front_of_anothers() -> None:
    order = []

    def theirs(graph_module: Any, inputs: Any) -> Any:
        order.append("theirs")
        return graph_module.forward

    @dynamo.assume_constant_result
    def in_front() -> bool:
        frame = Frame()
        behind = frame.backend
        assert dynamo.innermost_backend(behind) is theirs

        def ours(graph_module: Any, inputs: Any, **options: Any) -> Any:
            order.append("ours")
            return behind(graph_module, inputs, **options)

        frame.backend = ours
        return True

    def call(x: Tensor) -> Tensor:
        return x + 1 if in_front() else x

    dynamo.compiled(call, theirs, lambda callback: callback)(X)
    assert order == ["ours", "theirs"]


def test_the_limit_of_graphs_raises() -> None:
    def call(x: Tensor, text: str) -> Tensor:
        return x + len(text)

    run, _ = traced(call, lambda *_: None)
    few = config.patch(**{**dynamo.KNOBS, "recompile_limit": 2})
    with pytest.raises(dynamo.FailOnRecompileLimitHit), few:
        for number in range(4):
            run(X, "x" * number)


def test_what_switches_compilation_off_is_named() -> None:
    assert dynamo.switched_off() is None
    with config.patch(disable=True):
        assert "TORCH_COMPILE_DISABLE" in str(dynamo.switched_off())
    with torch.compiler.set_stance("force_eager"):
        assert "force_eager" in str(dynamo.switched_off())


def test_a_transform_of_torch_func_is_seen() -> None:
    seen = []

    def call(x: Tensor) -> Tensor:
        seen.append(dynamo.is_functorch_active())
        return x.sum()

    call(X), torch.func.grad(call)(X)
    assert seen == [False, True]


def test_a_module_without_a_compiled_call_is_called_by_call_of_module() -> None:
    model = Mean()
    model.__dict__["_compiled_call_impl"] = lambda x: "compiled"
    assert model(X) == "compiled"
    assert dynamo.call_of_module(model, X).shape == (2, 3)


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(x, 2)


@pytest.mark.parametrize("change", ["nothing", "own forward", "forward of the class", "own call"])
def test_a_trace_goes_straight_to_the_forward_of_the_class(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = dynamo.UnspecializedNNModuleVariable
    monkeypatch.setattr(kind, "call_function", kind.call_function)  # which is put back
    layer, other, asked = Doubling(), nn.ReLU(), []
    for each in (layer, other):
        each.forward = lambda x: torch.mul(x, 3)  # the front end makes no short cut of its own

    def goes_straight(inner: dynamo.Inner) -> bool:
        asked.append(inner.module)
        inner.guard_identity("forward", "_compiled_call_impl")
        return inner.module is layer

    dynamo.straighten(goes_straight)
    stacks = lambda frame, graph_module, inputs: [  # noqa: E731
        node.meta.get("nn_module_stack") for node in graph_module.graph.nodes if node.name == "mul"
    ]
    run, seen = traced(lambda x: other(layer(x)), stacks)
    layer._compiled_call_impl = None
    other._compiled_call_impl = None
    assert torch.equal(run(X), 6 * X) and asked == [layer, other]
    assert [list(stack) for stack in seen[0]] == [[str(id(layer))]]
    changes: dict[str, Callable[[], Any]] = {
        "nothing": lambda: None,
        "own forward": lambda: setattr(layer, "forward", lambda x: x),
        "forward of the class": lambda: monkeypatch.setattr(Doubling, "forward", lambda self, x: torch.mul(x, 5)),
        "own call": lambda: setattr(layer, "_compiled_call_impl", layer._call_impl),
    }
    changes[change]()
    assert torch.equal(run(X), (15 if change == "forward of the class" else 6) * X)
    assert len(seen) == (1 if change == "nothing" else 2)


def test_a_trace_goes_into_what_was_one_node_or_into_another_function() -> None:
    """As the capture's own modules have it, since they were imported."""
    from swalp_fx.capture import compiler

    layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True).eval()
    names = lambda frame, graph_module, inputs: {node.name for node in graph_module.graph.nodes}  # noqa: E731
    run, seen = traced(layer.self_attn.forward, names)
    run(torch.ones(1, 3, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 4))
    assert any("softmax" in name or "attn_output_weights" in name for name in seen[0])
    assert compiler.get_fastpath_enabled() and torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        run, seen = traced(layer.forward, names)
        run(torch.ones(1, 3, 4))
        assert "_transformer_encoder_layer_fwd" in seen[0]


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_a_number_of_a_tensor_is_an_argument_in_the_graph(
    named: bool, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = torch.nn.functional.huber_loss
    monkeypatch.setitem(dynamo.TorchInGraphFunctionVariable._get_handlers(), function, None)  # which is taken out again
    dynamo.trace_number(function, "delta", 1.0, lambda: holds)

    def call(x: Tensor, y: Tensor, threshold: Tensor) -> Tensor:
        delta = 1 / float(threshold)
        return function(x, y, delta=delta) if named else function(x, y, "mean", delta)

    run, seen = traced(call, lambda frame, graph_module, inputs: graph_module.code)
    with dynamo.knobs():
        for threshold in (2.0, 4.0, 5.0):
            given = X, torch.zeros(2, 3), torch.tensor(threshold)
            assert torch.equal(run(*given), call(*given))
    assert any("huber_loss" in code for code in seen) == holds and len(seen) == 1
