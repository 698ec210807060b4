"""The table of operations holds on real operations: movement makes no new number, and a possible view is one."""

import operator
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from graphs import converted, rewritten
from marks import rounded
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from swalp_fx import nodes, quantize
from swalp_fx.passes.names import PART, place
from swalp_fx.passes.operations import name_of
from swalp_fx.passes.tables import OPERATIONS, TABLE, is_product, part_of

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)) + 2  # no number twice, none zero
IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(2)) + 2
ROW, INDEX = torch.tensor([1, 0]), torch.tensor([[1, 0, 2, 3, 1, 0]])
ONES = X > 2

# Name -> a call that moves its argument. Without a line: the tensor is the only argument.
CALLS = {
    "getitem": lambda x: x[1:],
    "data": lambda x: x.data,
    "view": lambda x: x.view(-1),
    "view_as": lambda x: x.view_as(x.T.contiguous().T),
    "reshape": lambda x: x.reshape(-1),
    "reshape_as": lambda x: x.reshape_as(torch.empty(6, 4)),
    "unflatten": lambda x: x.unflatten(1, (2, 3)),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "transpose": lambda x: x.transpose(0, 1),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "swapdims": lambda x: x.swapdims(0, 1),
    "movedim": lambda x: x.movedim(0, 1),
    "moveaxis": lambda x: x.moveaxis(0, 1),
    "permute": lambda x: x.permute(1, 0),
    "narrow": lambda x: x.narrow(0, 1, 2),
    "select": lambda x: x.select(0, 1),
    "chunk": lambda x: x.chunk(2),
    "split": lambda x: x.split(2),
    "split_with_sizes": lambda x: x.split_with_sizes([1, 3]),
    "tensor_split": lambda x: x.tensor_split(2),
    "hsplit": lambda x: x.hsplit(2),
    "vsplit": lambda x: x.vsplit(2),
    "dsplit": lambda x: x.view(2, 2, 6).dsplit(2),
    "unsafe_split": lambda x: x.unsafe_split(2),
    "unsafe_chunk": lambda x: x.unsafe_chunk(2),
    "unfold": lambda x: x.unfold(1, 3, 1),
    "expand": lambda x: x.expand(2, 4, 6),
    "expand_as": lambda x: x.expand_as(torch.empty(2, 4, 6)),
    "broadcast_to": lambda x: x.broadcast_to((2, 4, 6)),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, x[:1]),
    "as_strided": lambda x: x.as_strided((2, 3), (6, 1)),
    "to": lambda x: x.to(torch.float32),
    "type": lambda x: x.type(torch.float32),
    "type_as": lambda x: x.type_as(x),
    "dropout": lambda x: F.dropout(x, training=False),
    "dropout1d": lambda x: F.dropout1d(x, training=False),
    "dropout2d": lambda x: F.dropout2d(x.view(1, 4, 2, 3), training=False),
    "dropout3d": lambda x: F.dropout3d(x.view(1, 4, 1, 2, 3), training=False),
    "alpha_dropout": lambda x: F.alpha_dropout(x, training=False),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, training=False),
    "cat": lambda x: torch.cat([x, x]),
    "concat": lambda x: torch.concat([x, x]),
    "concatenate": lambda x: torch.concatenate([x, x]),
    "_chunk_cat": lambda x: torch._chunk_cat([x, x], 0, 2),
    "linalg_diagonal": lambda x: torch.linalg.diagonal(x),
    "stack": lambda x: torch.stack([x, x]),
    "hstack": lambda x: torch.hstack([x, x]),
    "vstack": lambda x: torch.vstack([x, x]),
    "dstack": lambda x: torch.dstack([x, x]),
    "column_stack": lambda x: torch.column_stack([x, x]),
    "row_stack": lambda x: torch.row_stack([x, x]),
    "repeat": lambda x: x.repeat(2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "tile": lambda x: x.tile((2, 1)),
    "index_select": lambda x: x.index_select(0, ROW),
    "gather": lambda x: x.gather(0, INDEX),
    "take": lambda x: x.take(INDEX),
    "take_along_dim": lambda x: x.take_along_dim(INDEX, 0),
    "roll": lambda x: x.roll(1),
    "flip": lambda x: x.flip(0),
    "pad": lambda x: F.pad(x, (1, 1)),
    "where": lambda x: torch.where(ONES, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(ONES, 0.0),
    "masked_select": lambda x: x.masked_select(ONES),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.view(4, 2, 3), 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x.view(1, 4, 6), 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x.view(1, 4, 2, 3), 2),
    "fold": lambda x: F.fold(x.view(1, 4, 6), (4, 6), 2, stride=2),
    "topk": lambda x: x.topk(2).values,
    "sort": lambda x: x.sort().values,
    "scatter": lambda x: x.scatter(0, INDEX, x[:1]),
    "masked_scatter": lambda x: x.masked_scatter(ONES, x),
    "index_copy": lambda x: x.index_copy(0, ROW, x[:2]),
    "index_fill": lambda x: x.index_fill(0, ROW, 0.0),
    "fftshift": lambda x: torch.fft.fftshift(x),
    "ifftshift": lambda x: torch.fft.ifftshift(x),
    "meshgrid": lambda x: torch.meshgrid(x[0], x[1], indexing="ij"),
    "block_diag": lambda x: torch.block_diag(x, x),
    "cartesian_prod": lambda x: torch.cartesian_prod(x[0], x[1]),
    "combinations": lambda x: torch.combinations(x[0]),
    "max_unpool1d": lambda x: F.max_unpool1d(*F.max_pool1d(x[None], 2, return_indices=True), 2),
    "max_unpool2d": lambda x: F.max_unpool2d(*F.max_pool2d(x[None], 2, return_indices=True), 2),
    "max_unpool3d": lambda x: F.max_unpool3d(*F.max_pool3d(x.view(1, 1, 2, 2, 6), 2, return_indices=True), 2),
    "diagonal_scatter": lambda x: x.diagonal_scatter(x[0, :4]),
    "select_scatter": lambda x: x.select_scatter(x[1], 0, 0),
    "slice_scatter": lambda x: x.slice_scatter(x[:1], 0, 0, 1),
    "as_strided_scatter": lambda x: x.as_strided_scatter(x[:1], (1, 6), (6, 1)),
}
# Names that a captured graph has, and no call of ours.
SPELLED = ["_get_data_attr", "register_hook", "numpy_T", "matrix_H", "_squeeze", "_unsqueeze", "requires_grad_", "cuda"]
SPELLED += ["fft_fftshift", "fft_ifftshift"]
DRAWN = [
    "feature_dropout",
    "native_dropout",
    "native_dropout_backward",
    "stochastic_depth",
    "drop_block2d",
    "drop_block3d",
]
OF_ATEN = [name for name in OPERATIONS if name.endswith("_copy") or name in ("slice", "alias", "lift", "lift_fresh")]
OF_ATEN += ["constant_pad_nd", "unsafe_view", "to_copy", "resize", "set"]
OF_OTHERS = ["fill", "zero", "copy", "complex", "view_as_real", "view_as_complex", "imag"]  # than one real tensor
OTHERS = ("setitem", *SPELLED, *DRAWN, *OF_ATEN, *OF_OTHERS)
MOVES = [name for name, row in OPERATIONS.items() if row.part == "movement" and name.strip("_")[0].islower()]
HALVES = ("double", "half", "bfloat16", "cfloat", "cdouble", "chalf")  # another dtype: of these numbers, copies


def _call(name, x):
    if name in CALLS:
        return CALLS[name](x)
    function = getattr(torch.Tensor, name, None) or getattr(torch, name)
    return function(x) if callable(function) else function.__get__(x)


TRIED = [name for name in [*MOVES, "T", "mT", "H", "mH"] if name not in (*OTHERS, *HALVES)]


@pytest.mark.parametrize("name", TRIED)
def test_what_moves_gives_numbers_that_it_is_given_or_zeros(name):
    given = _call(name, X)
    for leaf in pytree.tree_leaves(given):
        assert torch.isin(leaf, torch.cat([X.flatten(), torch.zeros(1)])).all()


@pytest.mark.parametrize("name", [name for name in TRIED if "views" in OPERATIONS[name].does])
def test_what_may_be_a_view_is_one(name):
    x = X.clone()
    assert pytree.tree_leaves(_call(name, x))[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", [name for name in TRIED if "views" not in OPERATIONS[name].does])
def test_what_is_no_view_gives_memory_of_its_own(name):
    x = X.clone()
    for leaf in pytree.tree_leaves(_call(name, x)):
        assert leaf.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_no_name_has_two_rows():
    names = [line.split("|")[2].split() for line in TABLE.splitlines() if line and not line.startswith("#")]
    assert max(Counter(name for each in names for name in each).values()) == 1


MAKES = {
    "drawn around": lambda x: torch.normal(x, 0.1),
    "drawn with a chance": lambda x: torch.bernoulli(x.sigmoid()) * 0.3,
    "of a comparison": lambda x: (x > 0).float() * 0.3,
    "of integers": lambda x: (x * 127).int() / 127,
    "alpha dropout": lambda x: F.alpha_dropout(x, training=True),
    "scatter of sums": lambda x: x.scatter(1, INDEX[None].expand(2, -1, -1), x, reduce="add"),
    "overlapping fold": lambda x: F.fold(F.unfold(x[:, None], 2), x.shape[1:], 2),
}


class Before(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.layer, self.call = nn.Linear(6, 6), call

    def forward(self, x):
        given = self.call(self.layer(x))
        return (given[0] if isinstance(given, list | tuple) else given).exp()


@pytest.mark.parametrize("call", MAKES.values(), ids=MAKES)
def test_what_makes_new_numbers_is_rounded(call):
    made = rewritten(Before(call), "bfp8[0]", X.expand(2, 4, 6).clone())
    (last,) = [node for node in made.captured.nodes if place(node) == "exp"]
    source = last.all_input_nodes[0]
    while source.meta[PART] == "movement":
        source = source.all_input_nodes[0]
    assert place(source) in rounded(made.graph)


@pytest.mark.parametrize("name", CALLS)
def test_what_moves_is_not_rounded_again(name):
    model = converted(Before(CALLS[name]), "bfp8[0]")
    model(X)
    # Some calls break a graph. The outputs of a graph after a break are rounded.
    places = [each for made in model.graphs for each in rounded(made.graph) if each != "exp"]
    assert [each for each in places if not each.startswith("max_pool")] == ["layer"]


@pytest.mark.parametrize("trace", ["make_fx", "export"])
def test_overloads_of_aten_are_their_operations(trace):
    model = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, 6), nn.Softmax(-1)
    )
    model.requires_grad_(trace == "export")
    given = torch.export.export(model, (X,)).module() if trace == "export" else make_fx(model)(X)
    made = rewritten(given, "bfp8[0] quantize_logits=true", X)
    parts = [
        node.meta[PART] for node in made.captured.nodes if node.meta[PART] in ("compute", "activation", "arithmetic")
    ]
    assert parts == ["compute", "activation", "compute", "activation"]
    assert len(rounded(made.graph)) == 4


def test_an_operator_that_others_have_registered_is_not_trusted_by_its_name():
    with torch.library._scoped_library("swalp_tests", "DEF") as library:
        library.define("fold(Tensor x) -> Tensor")
        library.impl("fold", lambda x: x * 0.3, "CompositeImplicitAutograd")
        fold = torch.ops.swalp_tests.fold
        made = rewritten(Before(fold), "bfp8[0]", X)
        assert any(
            name_of(node.args[0]) == "fold" for node in made.graph.nodes if "quantize_output" in str(node.target)
        )


LIKE_OTHERS = {
    "a dropout of aten": (lambda x: torch.native_dropout(x, 0.5, True)[0], []),
    "a product with a truth value": (lambda x: torch.mul(x, x.is_complex()), ["mul"]),
    "a dropout of others": (lambda x: torch.ops.swalp_tests.fused_dropout(x), ["fused_dropout"]),
    "a split of others": (lambda x: torch.ops.swalp_tests.my_split(x)[1], ["my_split"]),
}


@pytest.mark.parametrize("case", LIKE_OTHERS)
def test_names_that_look_like_others_run(case):
    """The pass and the proof agree on them."""
    call, places = LIKE_OTHERS[case]
    with torch.library._scoped_library("swalp_tests", "DEF") as library:
        library.define("fused_dropout(Tensor x) -> Tensor")
        library.impl("fused_dropout", lambda x: x * 0.3, "CompositeImplicitAutograd")
        library.define("my_split(Tensor x) -> Tensor[]")
        library.impl("my_split", lambda x: [x * 1, x * 2], "CompositeImplicitAutograd")
        made = rewritten(Before(call), "bfp8[0]", X)
    assert rounded(made.graph) == ["layer", *places]


WEIGHT = torch.randn(6, 6)
PRODUCTS = {
    "conv_tbc": lambda x: torch.conv_tbc(x[None], WEIGHT[None], WEIGHT[0]),
    "kron": lambda x: torch.kron(x, WEIGHT),
    "linalg_vecdot": lambda x: torch.linalg.vecdot(x, WEIGHT[0]),
    "linalg_multi_dot": lambda x: torch.linalg.multi_dot([x, WEIGHT, WEIGHT]),
    "chain_matmul": lambda x: torch.chain_matmul(x, WEIGHT),
    "linalg_matmul": lambda x: torch.linalg.matmul(x, WEIGHT),
    "matrix_power": lambda x: torch.matrix_power(x.mT @ x, 2),
    "linalg_matrix_exp": lambda x: torch.linalg.matrix_exp(x.mT @ x),
    "imatmul": lambda x: operator.imatmul(x, WEIGHT),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.filterwarnings("ignore:.*chain_matmul")
def test_every_spelling_of_a_product_is_compute(name):
    made = rewritten(Before(PRODUCTS[name]), "bfp8[0] placement=compute", X)
    assert rounded(made.graph)[-1] == name
    assert is_product(name)


def test_selections_are_pooling():
    selections = {"maximum", "minimum", "fmax", "fmin", "cummax", "cummin", "median", "mode", "kthvalue", "aminmax"}
    pools = {f"{start}max_pool{n}d_with_indices" for start in ("", "adaptive_") for n in (1, 2, 3)}
    assert {part_of(name) for name in selections | pools | {"fractional_max_pool2d"}} == {"pooling"}
    assert part_of("clamp_min") == part_of("clamp_max") == "activation"


def test_a_complex_activation_is_rounded_by_its_real_and_its_imaginary_part():
    class Fourier(nn.Module):
        def forward(self, x):
            return torch.view_as_real(torch.fft.fft2(x)) + 0.0

    low = converted(Fourier(), "A=bfp8[0] rounding=nearest quantize_logits=true exclude=add")
    whole = torch.fft.fft2(X)
    parts = [quantize(part, "bfp8[0]", "nearest") for part in (whole.real, whole.imag)]
    assert torch.equal(low(X), torch.stack(parts, -1))
    x = X.clone().requires_grad_()
    low(x).square().sum().backward()
    assert x.grad.isfinite().all()


def test_the_parts_of_a_complex_number_are_rounded_by_bits_of_their_own():
    x = torch.complex(X, X)
    found = nodes.quantize_output(x, torch.tensor(3), 7, "bfp4[0]", "bfp4[0]", "stochastic")
    assert torch.equal(found.real, quantize(X, "bfp4[0]", "stochastic", key=torch.tensor(3), stream=7))
    assert not torch.equal(found.real, found.imag)
