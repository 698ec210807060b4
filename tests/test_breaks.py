"""Code that Python runs between graphs: what it calls is rewritten, and what no graph rounds is named."""

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from captured import NEAREST, X
from torch import nn

from swalp_fx import convert, report
from swalp_fx.capture import Conversion, compiler


def test_behind_a_break_in_what_another_compiles_all_is_rounded():
    """There nothing names the model any more: its forward has read all of it that it needs."""

    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(torch.relu(_broken(self.layer(x) * 3) * 5))

    def _broken(x):
        torch._dynamo.graph_break()
        return x

    torch.manual_seed(0)
    lp = convert(Breaks(), recipe=NEAREST).module
    expected = lp(X)
    assert torch.equal(torch.compile(lp, backend="eager")(X), expected)


class Broken(nn.Module):
    """Two layers, a graph break between them."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        x = self.fc(x)
        print(end="")
        return self.head(x)


class Looping(Broken):
    """No torch goes on behind a break in a loop: its forward runs as Python, and its layers have graphs."""

    def forward(self, x):
        for layer in (self.fc, self.head):
            x = torch.tanh(layer(x))
            print(end="")
        return x


class Printer:
    def show(self, x):
        print(end="")
        return x


class Showing(Broken):
    """Nor does torch 2.11 behind one in a method of another object that is an attribute."""

    def __init__(self):
        super().__init__()
        self.show = Printer().show

    def forward(self, x):
        return self.head(torch.tanh(self.show(self.fc(x))))


@pytest.mark.parametrize("kind", [Looping, Showing])
def test_what_no_graph_rounds_is_named_with_its_line(kind):
    lp, _ = convert(kind(), recipe=NEAREST)
    text = str(report(lp, torch.randn(2, 3)))
    lines, first = inspect.getsourcelines(kind.forward)
    (line,) = (i for i, each in enumerate(lines, first) if "tanh" in each)
    is_rounded = any("quantize_output(tanh" in made.code for made in lp.graphs)
    assert is_rounded != (f"test_breaks.py:{line} forward: tanh" in text)


class Judging(Broken):
    """A loss that looks at its values runs as Python: PyTorch's own code, which this line calls."""

    judge = nn.GaussianNLLLoss()

    def forward(self, x):
        return self.judge(self.fc(x), x, torch.ones_like(x))  # judge


def test_a_layer_of_pytorch_that_runs_as_python_is_named_by_the_line_that_calls_it():
    lp, _ = convert(Judging(), recipe=NEAREST)
    lines, first = inspect.getsourcelines(Judging.forward)
    (line,) = (i for i, each in enumerate(lines, first) if "# judge" in each)
    text = str(report(lp, torch.randn(2, 3)))
    assert f"test_breaks.py:{line} forward: " in text and "ways.py" not in text


def test_models_of_one_class_do_not_share_one_limit_of_graphs(monkeypatch):
    torch._dynamo.reset()  # graphs of other tests count too
    monkeypatch.setattr(compiler, "MAX_GRAPHS", 2)
    monkeypatch.setattr(Conversion, "count", 0)
    x, models = torch.randn(2, 3), [Broken() for _ in range(5)]
    for model in models:
        convert(model, recipe=NEAREST)
    for model in models:
        assert model(x).shape == (2, 2) and len(model.graphs) == 2


class Waiting(Broken):
    """Its first layer runs in a thread that its forward waits for."""

    def forward(self, x):
        with ThreadPoolExecutor(1) as threads:
            x = threads.submit(self.fc, x).result(timeout=60)
        return self.head(x)


def test_a_forward_may_wait_for_a_thread_that_calls_its_layers():
    model = Waiting()
    lp, _ = convert(model, recipe=NEAREST)
    assert lp(torch.randn(2, 3)).shape == (2, 2)
    assert {made.path for made in lp.graphs} == {"fc", "head"}


class Patching(Broken):
    """Its forward wraps a layer's forward for a while, as transformers does to record outputs."""

    def forward(self, x):
        kept, before = [], self.fc.forward

        def recording(x):
            kept.append(before(x))
            return kept[-1]

        self.fc.forward = recording
        y = self.head(self.fc(x))
        self.fc.forward = before
        return y, kept[0]


def test_a_forward_may_wrap_that_of_a_layer_while_it_runs():
    model, x = Patching(), torch.randn(2, 3)
    before = copy.deepcopy(model)(x)
    lp, _ = convert(model, recipe="float")
    for _ in range(2):
        assert all(map(torch.equal, lp(x), before))
    assert len(lp.graphs) == 1
