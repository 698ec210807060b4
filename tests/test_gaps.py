"""A call warns of each line with a product that Python runs in float, and of nothing that is meant to be in float."""

import copy
import inspect
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from swalp_fx import Recipe, Rule, check, convert, in_float, report

RECIPE = "bfp4[0] rounding=nearest"
FLOAT = {"weight": "float", "activation": "float", "error": "float"}
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


class Mixer(nn.Module):
    """A product of its own, which Python runs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    @torch.compiler.disable
    def forward(self, x):
        return x @ self.weight  # product


class Net(nn.Module):
    def __init__(self, mixer=Mixer):
        super().__init__()
        self.first, self.mixer, self.second = nn.Linear(8, 8), mixer(), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(torch.relu(self.mixer(self.first(x))))


@torch.compiler.disable
def disabled(x, weight):
    return torch.einsum("ij,jk->ik", x, weight)  # product


class Calling(Net):
    def forward(self, x):
        return self.second(disabled(self.first(x), self.mixer.weight))


class Looping(Net):
    """No torch goes on behind a break in a loop: this forward runs as Python."""

    def forward(self, x):
        for _ in range(2):
            x = x @ self.mixer.weight  # product
            print(end="")
        return self.second(x)


class Scoring(Net):
    """Neither operand is a parameter."""

    def forward(self, x):
        for layer in (self.first,):
            x = layer(x)
            print(end="")
            x = (x @ x.mT) @ x  # product
        return self.second(x)


def made(kind=Net, recipe=RECIPE):
    torch.manual_seed(0)
    return convert(kind(), recipe=recipe).module


def heard(call, *inputs):
    """The texts of the warnings of a call."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call(*inputs)
    return [str(each.message) for each in found]


def line_of(function):
    lines, first = inspect.getsourcelines(inspect.unwrap(function))
    (line,) = (i for i, each in enumerate(lines, first) if "# product" in each)
    return f"test_gaps.py:{line} "


CASES = {
    "a layer that nothing traces": (Net, Mixer.forward, "matmul"),
    "a function that nothing traces": (Calling, disabled, "einsum"),
    "a forward with a break in a loop": (Looping, Looping.forward, "matmul"),
    "scores": (Scoring, Scoring.forward, "matmul"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_call_names_the_line_the_operation_and_the_remedy_and_no_later_one_does(case):
    kind, function, operation = CASES[case]
    lp = made(kind)
    (text,) = heard(lp, X)
    assert f"{line_of(function)}{inspect.unwrap(function).__name__}: {operation} computed in float" in text
    assert "take away what breaks the graph there" in text
    for _ in range(4):
        assert heard(lp, X) == []
    assert line_of(function) in str(report(lp, X))


def test_it_points_at_the_users_call():
    with pytest.warns(UserWarning, match="computed in float") as found:
        made()(X)
    assert [each.filename for each in found] == [__file__]


def test_each_converted_model_warns_and_so_does_a_copy():
    lp = made()
    assert [len(heard(each, X)) for each in (lp, made(), copy.deepcopy(lp), lp)] == [1, 1, 1, 0]


def between(compute, recipe=RECIPE):
    """A converted model in which Python runs ``compute(model, h)`` between two layers."""

    class Between(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(8, 8))
            self.copying = Copying()

        def forward(self, x):
            h = self.first(x)
            return self.second(h + 0 * torch.compiler.disable(compute)(self, h).sum())

    return made(Between, recipe)


class Copying(nn.Module):
    """Its graph writes into a tensor that it is given."""

    def forward(self, into, x):
        into.copy_(x.detach())
        return x + 0


def scores_of_what_a_graph_wrote(m, h):
    constant = torch.zeros(5, 8)
    m.copying(constant, h)
    return constant @ constant.mT


def scores_of_what_a_list_wrote(m, h):
    constant = torch.zeros(5, 8)
    torch._foreach_copy_([constant], [h.detach()])
    return constant @ constant.mT


def product_behind_swapped_memory(m, h):
    m.table.data = m.table.data + 1
    others = [h * i for i in range(40)]  # some may lie where the table lay
    return torch.stack([each @ each.mT for each in others])


# A product of the model -> its name
PRODUCTS = {
    "conv_tbc": lambda m, h: torch.conv_tbc(h[None], m.mixer.weight[None], m.table[0]),
    "outer": lambda m, h: torch.outer(h[0], m.mixer.weight[0]),
    "ger": lambda m, h: h[0].ger(m.mixer.weight[0]),
    "kron": lambda m, h: torch.kron(h, m.mixer.weight),
    "einsum, element by element": lambda m, h: torch.einsum("bi,bi->bi", h, m.mixer.weight[:5]),
    "linalg_vecdot": lambda m, h: torch.linalg.vecdot(h, m.mixer.weight[:5]),
    "linalg_multi_dot": lambda m, h: torch.linalg.multi_dot([h, m.mixer.weight, m.table]),
    "matrix_exp": lambda m, h: torch.matrix_exp(m.mixer.weight),
    "bilinear": lambda m, h: nn.functional.bilinear(h, h, m.mixer.weight[None]),
    "sparse_mm": lambda m, h: torch.sparse.mm(m.table.to_sparse(), h.mT),
    "matmul of a truth value": lambda m, h: (h > 0).float() @ m.table,
    "matmul of what a graph wrote": scores_of_what_a_graph_wrote,
    "matmul of what a list wrote": scores_of_what_a_list_wrote,
    "matmul behind swapped memory": product_behind_swapped_memory,
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_is_named_by_the_name_that_a_recipe_has_for_it(case):
    (text,) = heard(between(PRODUCTS[case]), X)
    assert f": {case.partition(',')[0].partition(' ')[0]} computed in float" in text


# Made of the weight alone -> a product with an activation, which no recipe rounds
OF_A_WEIGHT = {
    "itself": lambda m, h: h @ m.mixer.weight,
    "a copy": lambda m, h: h @ m.mixer.weight.detach().clone(),
    "scaled": lambda m, h: h @ (m.mixer.weight * 2 + m.table),
    "in new memory": lambda m, h: setattr(m.mixer.weight, "data", m.mixer.weight.data.clone()) or h @ m.mixer.weight,
}


@pytest.mark.parametrize("case", OF_A_WEIGHT)
def test_where_only_weights_are_rounded_what_is_made_of_a_weight_alone_stands_for_it(case):
    call = OF_A_WEIGHT[case]
    (text,) = heard(between(call, "float W=bfp4[0]"), X)
    assert "matmul computed in float" in text
    assert heard(between(call, f"{RECIPE} W=float exclude=matmul"), X) == []


EXCLUDED = {
    "matmul": lambda m, h: h @ m.mixer.weight,
    "linear": lambda m, h: nn.functional.linear(h, m.mixer.weight, m.table[0]),
    "einsum": lambda m, h: torch.einsum("bi,ij->bj", h, m.mixer.weight),
    "conv1d": lambda m, h: nn.functional.conv1d(h[None], m.mixer.weight[:5, :5, None]),
    "outer": lambda m, h: torch.outer(h[0], m.mixer.weight[0]),
}


@pytest.mark.parametrize("by", ["exclude", "kind"])
@pytest.mark.parametrize("name", EXCLUDED)
def test_an_exclusion_by_the_name_that_the_line_has_holds(name, by):
    rules = [Rule("mixer.weight", weight="float"), *([Rule("*", kind=name, **FLOAT)] if by == "kind" else [])]
    recipe = Recipe.parse(RECIPE, rules=tuple(rules), exclude=(name,) if by == "exclude" else ())
    assert heard(between(EXCLUDED[name], recipe), X) == []
    other = next(each for each in EXCLUDED if each != name)
    assert len(heard(between(EXCLUDED[other], recipe), X)) == 2  # its product, and that the exclusion matches nothing


def test_a_line_with_two_products_is_silent_only_if_both_are_excluded():
    def both(m, h):
        return nn.functional.linear(h @ m.table, m.mixer.weight)

    recipe = f"{RECIPE} W=float exclude="
    (text,) = heard(between(both, f"{recipe}matmul"), X)
    assert "linear, matmul computed in float" in text
    assert heard(between(both, f"{recipe}matmul,linear"), X) == []


def test_a_watched_call_keeps_no_tensor_alive():
    freed = []

    def fill(m, h):
        for make in (torch.zeros, torch.rand):
            memory = weakref.ref(make(5, 8).untyped_storage())
            freed.append(memory() is None)
        return h

    lp = between(fill)
    lp(X)
    assert lp._swalp.conversion.has_gaps is False and freed == [True, True]


# What is meant to be in float, or is no product of the model


def rule(path):
    return Recipe.parse(RECIPE, rules=(Rule(path, **FLOAT),))


class Constant(Net):
    """A product of positions and a buffer, as in rotary embeddings."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.rand(8))

    @torch.compiler.disable
    def angles(self, x):
        table = torch.zeros(len(x), 8)
        table[:] = torch.arange(len(x))[:, None].float() @ self.frequencies[None]
        return table

    def forward(self, x):
        return self.second(self.first(x) + self.angles(x).cos())


class Forces(Net):
    """The derivative of an energy, which backward computes."""

    def forward(self, x):
        x = x.detach().requires_grad_()
        energy = self.second(torch.tanh(self.first(x))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


class Stepping(Net):
    """A method that trains."""

    def fit(self, x):
        optimizer = torch.optim.Muon([self.first.weight])
        self.second(torch.relu(self.first(x))).sum().backward()
        optimizer.step()


class Teacher(Net):
    """Calls a converted model in float."""

    def __init__(self):
        super().__init__()
        self.teacher = [made(Looping)]

    @torch.compiler.disable
    def taught(self, x):
        with in_float(self.teacher[0]) as teacher:
            return teacher(x)

    def forward(self, x):
        return self.second(self.first(x)) + self.taught(x)


SILENT = {
    "in_float": lambda: _in_float(made()),
    "restored": lambda: _in_float(made(), for_good=True),
    "a float recipe": lambda: made(recipe="float"),
    "a float recipe of forwards": lambda: made(recipe="float G=bfp8 M=bfp8"),
    "a rule": lambda: made(recipe=rule("mixer")),
    "a rule of a kind": lambda: made(recipe=Recipe.parse(RECIPE, rules=(Rule("*", kind="Mixer", **FLOAT),))),
    "excluded, with a weight in float": lambda: made(recipe=f"{RECIPE} W=float exclude=mixer"),
    "scores, where only weights are rounded": lambda: made(Scoring, "float W=bfp4[0]"),
    "constants": lambda: made(Constant),
    "constants of an activation's size": lambda: between(lambda m, h: h.new_ones(5, 8) @ m.table),
    "constants like an activation": lambda: between(lambda m, h: torch.rand_like(h) @ m.table),
    "an elementwise product": lambda: between(lambda m, h: h * torch.outer(m.table[0, :5], m.table[1])),
    "tokens": lambda: between(lambda m, h: nn.functional.one_hot(torch.arange(8)).float() @ m.table),
    "a product of backward": lambda: made(Forces),
    "a product of an optimizer": lambda: made(Stepping).fit,
    "a teacher in float": lambda: made(Teacher),
    "all in graphs": lambda: made(Whole),
}


class Whole(Net):
    def forward(self, x):
        x = self.first(x)
        print(end="")
        return self.second(x)


def _in_float(lp, for_good=False):
    def call(x):
        with in_float(lp):
            return lp(x)

    return call


@pytest.mark.parametrize("case", SILENT)
def test_it_is_silent_of_what_is_meant(case):
    call = SILENT[case]()
    assert heard(call, X) == heard(call, X) == []


def test_check_is_silent_and_a_report_tells_once():
    assert heard(check, Net(), X) == []
    lp = made()
    assert len(heard(report, lp, X)) == 1
    assert heard(report, lp, X) == heard(lp, X) == []


# Later calls


class Branching(Net):
    """Looks at a value, so it may run another line at each call."""

    def forward(self, x):
        for layer in (self.first,):
            x = layer(x)
            print(end="")
            if x.abs().max() > 1e3:
                x = x @ self.mixer.weight  # product
        return self.second(x)


def test_a_line_that_a_later_call_reaches_is_named_within_twice_as_many_calls():
    lp = made(Branching)
    for _ in range(3):
        assert heard(lp, X) == []
    texts = [text for _ in range(5) for text in heard(lp, X * 1e6)]
    assert [line_of(Branching.forward) in text for text in texts] == [True]


class Switching(Net):
    """Captured whole, until its attribute changes."""

    mixes = False

    def forward(self, x):
        x = self.first(x)
        if self.mixes:
            x = disabled(x, self.mixer.weight)
        return self.second(x)


def test_a_new_graph_is_watched_too():
    lp = made(Switching)
    for _ in range(5):
        assert heard(lp, X) == []
    lp.mixes = True
    assert [len(heard(lp, X)) for _ in range(3)] == [1, 0, 0]


def test_a_model_that_is_captured_whole_is_not_watched():
    lp = made(Whole)
    lp(X)
    assert not any(lp._swalp.conversion.is_watched() for _ in range(9))


# Modes


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = 0

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += 1
        return function(*args, **(kwargs or {}))


class Moded(Net):
    """Its forward has a mode on while a graph is made, and while Python computes."""

    def __init__(self):
        super().__init__()
        self.mode = Counting()

    @torch.compiler.disable
    def forward(self, x):
        with self.mode:
            x = self.first(x)
            x = x @ self.mixer.weight  # product
        return self.second(x)


def test_a_mode_of_the_models_own_stays_the_innermost():
    lp = made(Moded)
    depth = torch._C._len_torch_dispatch_stack()
    texts = [heard(lp, X) for _ in range(4)]
    assert torch._C._len_torch_dispatch_stack() == depth and lp.mode.seen >= 4
    assert sum(map(len, texts)) == 1


def test_a_call_that_fails_leaves_no_mode_behind():
    class Failing(Looping):
        def forward(self, x):
            super().forward(x)
            raise KeyError("own")

    lp = made(Failing)
    for _ in range(2):
        with pytest.raises(KeyError, match="own"):
            lp(X)
        assert torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.filterwarnings("ignore:.*computed in float")
def test_a_watched_call_has_the_bits_of_any_other():
    lp = made(Scoring)
    first, *later = (lp(X) for _ in range(4))
    assert all(torch.equal(first, each) for each in later)


class Failing(Net):
    """Its first call raises, behind the product."""

    fails = True

    @torch.compiler.disable
    def fail(self):
        if Failing.fails:
            Failing.fails = False
            raise KeyError("no such batch")

    def forward(self, x):
        x = self.mixer(self.first(x))
        self.fail()
        return self.second(x)


def test_what_a_call_that_raised_has_found_the_next_one_tells():
    lp = made(Failing)
    with pytest.raises(KeyError):
        lp(X)
    (text,) = heard(lp, X)
    assert line_of(Mixer.forward) in text


class Sparse(Net):
    """Constants in layouts whose tensors have no one storage."""

    @torch.compiler.disable
    def constants(self):
        dense = torch.eye(8)
        return dense.to_sparse() @ dense + dense.to_sparse_csr() @ dense

    def forward(self, x):
        return self.second(self.first(x) + self.constants()[:1])


def test_constants_of_other_layouts_are_constants():
    lp = made(Sparse)
    assert not any("computed in float" in text for text in heard(lp, X))
