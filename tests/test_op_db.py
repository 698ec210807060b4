"""PyTorch's own lists of operations and layers, each between two layers: what makes new numbers is rounded, what makes
none is not rounded again, and nothing crashes.

    pytest -s tests/test_op_db.py            thirty operations and ten layers
    pytest -s -m slow tests/test_op_db.py    all of both lists: half an hour of one core
"""

import itertools
import warnings
from collections import defaultdict

import pytest
import torch
from operations import Outcome, outcome

from swalp_fx.passes.tables import layer_part, part_of

NAMED = ("left", "rounded again", "between two graphs", "not tried", "gives no numbers of what it is given")
SAMPLES = 3  # of each operation, far apart in its list

FRESH = "a constant, whatever tensor it has its size from"
DRAWN = "random numbers that have no parameter"
PYTHON = "PyTorch's front end leaves it to Python, between two graphs: the report names it"
# Name -> why later layers read its new numbers as they are.
LEFT = {
    **dict.fromkeys(("empty_like", "full_like", "new_empty", "new_empty_strided", "new_full"), FRESH),
    **dict.fromkeys(("rand_like", "randn_like", "uniform"), DRAWN),
    **dict.fromkeys(("cov", "linalg.lstsq", "linalg.lstsq.grad_oriented"), PYTHON),
    **dict.fromkeys(("nn.functional.ctc_loss", "nn.functional.gaussian_nll_loss"), PYTHON),
    **dict.fromkeys((f"nn.functional.linear_cross_entropy.{how}" for how in ("chunked", "chunked_none")), PYTHON),
    **dict.fromkeys(("nn.CTCLoss", "nn.GaussianNLLLoss"), PYTHON),
}
SELECTS = "it selects, where others of its name make sums"
ALIKE = "its samples happen to give zeros, or numbers alone"
# Name -> why it is rounded, though its samples give numbers that they are given.
AGAIN = {
    **dict.fromkeys(("index_reduce.amin", "index_reduce.amax", "scatter_reduce.amin", "scatter_reduce.amax"), SELECTS),
    **dict.fromkeys(("logsumexp", "logdet", "linalg.norm.subgradients_at_zero"), ALIKE),
    **dict.fromkeys(("masked.prod", "masked.logsumexp", "round.decimals_neg_3"), ALIKE),
    "nan_to_num": "infinities become the largest numbers of a type",
    "nn.functional.alpha_dropout": "its samples draw nothing: p = 0, p = 1",
}
# Layers that may only select. The placement rounds them; where the graph proves that this changes nothing, it does not.
SELECT = ("activation", "pooling")
SPARSE = "PyTorch's sparse tensors, which the rewrite does not take"
# Name -> why it is not tried.
NOT_TRIED = {
    **dict.fromkeys(("sparse.sampled_addmm", "sparse.mm.reduce", "to_sparse"), SPARSE),
    **dict.fromkeys(("jiterator_unary", "jiterator_binary", "jiterator_4inputs_with_extra_args"), "needs CUDA"),
    **dict.fromkeys(("jiterator_binary_return_by_ref", "jiterator_2inputs_2outputs"), "needs CUDA"),
}

FEW = """
abs add cat chunk cumsum diagonal_scatter einsum fft.fft2 flip gather __getitem__ linalg.diagonal linalg.solve
masked_fill max.binary nan_to_num native_layer_norm nn.functional.conv2d nn.functional.dropout nn.functional.gelu
nn.functional.max_pool2d nn.functional.pad.constant nn.functional.scaled_dot_product_attention scatter_reduce.sum sgn
softmax split_with_sizes stack std_mean topk where
"""
FEW_LAYERS = "BatchNorm2d Conv2d ConstantPad1d Embedding GRU L1Loss MaxPool2d MultiheadAttention ReLU Softmax"


@pytest.fixture(scope="module")
def lists():
    """(PyTorch's list of operations, its list of layers)."""
    reason = "torch.testing needs expecttest: pip install expecttest"
    names = [f"torch.testing._internal.common_{name}" for name in ("methods_invocations", "modules")]
    invocations, modules = (pytest.importorskip(name, exc_type=ImportError, reason=reason) for name in names)
    # The list sets a seed inside of some operations, which would end the graph there.
    patch = pytest.MonkeyPatch()
    patch.setattr(invocations, "wrapper_set_seed", lambda function, *args, **kwargs: function(*args, **kwargs))
    yield invocations.op_db, modules.module_db
    patch.undo()


def spread(samples):
    """A few of these, far apart."""
    found = list(itertools.islice(samples, 60))
    return found[:: max(1, len(found) // SAMPLES)][:SAMPLES]


def of_operation(info):
    for sample in spread(info.sample_inputs("cpu", torch.float32, requires_grad=False)):
        yield outcome(info.op, (sample.input, *sample.args), sample.kwargs)


def of_layer(info):
    made = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    for each in spread(made):
        if each.forward_input is not None:
            layer = info.module_cls(*each.constructor_input.args, **each.constructor_input.kwargs)
            yield outcome(layer, each.forward_input.args, each.forward_input.kwargs)


def faults(infos, outcomes, part):
    """What is wrong, by name; prints a summary."""
    found, counted = {}, defaultdict(list)
    for info in infos:
        name = getattr(info, "full_name", info.name)
        if name in NOT_TRIED:
            counted["not tried"].append(name)
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                seen = [each for each in outcomes(info) if each is not None]
        except Exception as error:
            found[name] = f"crashes: {type(error).__name__}: {str(error)[:200]}"
            continue
        finally:
            torch._dynamo.reset()
        said = said_of(seen, part(info))
        counted[said].append(name)
        exceptions = {"left": LEFT, "rounded again": AGAIN}.get(said)
        if exceptions is not None and name not in exceptions:
            found[name] = said
    for said, names in counted.items():
        print(f"\n{len(names):4} {said}" + (f": {' '.join(names)}" if said in NAMED else ""))
    return found


def said_of(seen: list[Outcome], part: str | None) -> str:
    if not seen:
        return "gives no numbers of what it is given"
    if any(each.is_left for each in seen):
        return "left"
    if any(each.broke for each in seen):
        return "between two graphs"
    if any(each.makes for each in seen):
        return "makes new numbers, which are on the grid"
    if not any(each.rounded for each in seen):
        return "makes none, and is not rounded"
    return "selects, and is rounded as a layer" if part in SELECT else "rounded again"


def part_of_operation(info):
    return part_of(getattr(info.op, "__name__", info.name).lstrip("_")) or part_of(info.name.rpartition(".")[2])


def part_of_layer(info):
    return layer_part(info.module_cls)


def floating(op_db):
    return [info for info in op_db if torch.float32 in info.supported_dtypes("cpu")]


def test_a_few_operations(lists):
    names = FEW.split()
    few = [info for info in floating(lists[0]) if info.full_name in names]
    assert len(few) > 25
    assert not faults(few, of_operation, part_of_operation)


def test_a_few_layers(lists):
    few = [info for info in lists[1] if info.module_cls.__name__ in FEW_LAYERS.split()]
    assert len(few) == 10
    assert not faults(few, of_layer, part_of_layer)


@pytest.mark.slow
def test_all_operations(lists):
    assert not faults(floating(lists[0]), of_operation, part_of_operation)


@pytest.mark.slow
def test_all_layers(lists):
    assert not faults(lists[1], of_layer, part_of_layer)
