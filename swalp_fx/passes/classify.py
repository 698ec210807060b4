"""Which node plays which part. The table is the whole rule: read it to know what is quantized."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn.utils.parametrize import ParametrizationList

from ..capture import IN_PLACE_OPERATORS, module_around, name_of, writes, writes_in_place
from ..recipe import Subject

__all__ = [
    "LAYER_PARTS",
    "NAME",
    "PART",
    "PARTS",
    "attribute",
    "classify",
    "is_derived",
    "is_listed",
    "is_torch",
    "kinds_of",
    "originals",
    "parameter_subjects",
    "place",
]

# The node.meta key that classify writes: one of the parts below, or one of "input", "output", "parameter" (a Parameter
# read by itself, or what a parametrization derives), "state" (a buffer, read, written, or what it is updated to) and
# "exit" (movement whose result the model only returns).
PART = "swalp_fx.part"

# The node.meta key that classify writes on inputs, parameters and layer outputs: their names under the root, which
# ``place`` reads.
NAME = "swalp_fx.name"

# Part -> the names of what plays it: functions and methods (a trailing underscore, for in place, is dropped), and
# module types (a subclass plays its base's part).
PARTS: dict[str, str] = {
    # Sums of products: what hardware spends its multipliers on.
    "compute": """
        Linear Bilinear
        _ConvNd Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d DeformConv2d
        Embedding EmbeddingBag MultiheadAttention RNNBase RNNCellBase Transformer
        TransformerEncoder TransformerDecoder TransformerEncoderLayer TransformerDecoderLayer
        linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d deform_conv2d
        embedding embedding_bag matmul mm mv bmm dot inner outer einsum tensordot addmm addmv addbmm baddbmm
        scaled_dot_product_attention multi_head_attention_forward
    """,
    "norm": """
        _NormBase LayerNorm GroupNorm RMSNorm LocalResponseNorm CrossMapLRN2d FrozenBatchNorm2d
        batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm normalize
    """,
    "activation": """
        ReLU RReLU ReLU6 LeakyReLU PReLU ELU SELU CELU GELU GLU SiLU Mish Softplus Softsign Softmin Softmax Softmax2d
        LogSoftmax Sigmoid LogSigmoid Tanh Tanhshrink Hardtanh Hardsigmoid Hardswish Hardshrink Softshrink Threshold
        relu rrelu relu6 leaky_relu prelu elu selu celu gelu glu silu mish softplus softsign softmin softmax
        log_softmax sigmoid logsigmoid log_sigmoid tanh tanhshrink hardtanh hardsigmoid hardswish hardshrink softshrink
        threshold clamp clip
    """,
    # And every call that no line names: a number that no rule knows is still a number.
    "arithmetic": """
        add sub mul div truediv rsub pow neg abs exp log sqrt rsqrt reciprocal square sin cos addcmul addcdiv lerp
        iadd isub imul itruediv ipow true_divide subtract multiply
    """,
    "pooling": """
        _MaxPoolNd _AvgPoolNd _AdaptiveMaxPoolNd _AdaptiveAvgPoolNd _LPPoolNd FractionalMaxPool2d FractionalMaxPool3d
        Upsample RoIAlign RoIPool PSRoIAlign PSRoIPool MultiScaleRoIAlign
        max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        interpolate upsample grid_sample mean sum amax amin max min
    """,
    # The same numbers elsewhere, or some of them, or zeros between them.
    "movement": """
        Identity Flatten Unflatten Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout
        StochasticDepth DropBlock2d DropBlock3d Permute PixelShuffle PixelUnshuffle ChannelShuffle Fold Unfold
        _ConstantPadNd _ReflectionPadNd _ReplicationPadNd _CircularPadNd
        getitem setitem cat concat concatenate stack hstack vstack dstack reshape view view_as flatten unflatten ravel
        squeeze unsqueeze _squeeze _unsqueeze permute transpose t T mT H mH swapaxes swapdims movedim moveaxis
        expand expand_as broadcast_to repeat repeat_interleave tile narrow select
        split chunk unbind tensor_split hsplit vsplit dsplit unsafe_split unsafe_chunk
        index_select gather take_along_dim roll flip rot90 pad contiguous clone detach copy where
        masked_fill masked_select
        to type type_as float double half bfloat16 cpu cuda requires_grad_ real imag diagonal tril triu
        dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout stochastic_depth
        drop_block2d drop_block3d pixel_shuffle pixel_unshuffle channel_shuffle unfold fold
        topk sort atleast_1d atleast_2d atleast_3d data fill zero scatter masked_scatter index_copy index_fill
    """,
    # Sizes, indices, comparisons and fresh constants: not a layer's output. So is whatever is made of these alone.
    "number": """
        size dim ndim ndimension numel nelement shape stride len item dtype device layout is_cuda requires_grad
        is_floating_point is_contiguous is_nested training eq ne lt le gt ge is_ is_not not_ and_ or_ xor invert
        logical_and logical_or logical_not logical_xor isnan isinf isfinite any all argmax argmin argsort nonzero
        bucketize searchsorted one_hot bincount long int bool get_device
        zeros ones full empty arange linspace eye zeros_like ones_like full_like empty_like
        rand randn randint randperm rand_like randn_like randint_like bernoulli normal uniform
        new_zeros new_ones new_full new_empty new_empty_strided new_tensor tensor as_tensor
        Size _assert warn
        is_grad_enabled _set_grad_enabled _enter_autocast _exit_autocast _enter_inference_mode _exit_inference_mode
    """,
}

# Parts whose output is a layer's output.
LAYER_PARTS = ("compute", "norm", "activation", "arithmetic", "pooling")

_PART_OF = {name: part for part, names in PARTS.items() for name in names.split()}
_TORCH = ("torch", "torchvision", "_operator", "builtins", "math")


def place(node: Node, path: str = "") -> str:
    """The one name of the place that ``node`` is, in recipes, reports, measures and drawings.

    node: an input, a parameter or a layer output, of a classified graph or of the graph that is made of it.
    path: where the graph's root stands in the model.

    A module's output has the module's name: ``layer1.0.conv1``. A function's output is named by the module that calls
    it and by the function: ``layer1.0.iadd``. Where several places of a graph have one name, each has its number behind
    it, in the order of the graph: ``layer1.0.relu@1``, ``layer1.0.relu@2``. An input that is named as a layer is has
    the number 0: ``tokens@0``. A bare layer that is its graph's root is named by its type: ``linear``.
    """
    return ".".join(filter(None, (path, node.meta.get(NAME, str(node.target))))) or node.name


def kinds_of(node: Node, root: nn.Module) -> list[str]:
    """What a rule may call a classified ``node``: its part, and the names of its operation."""
    kinds = [node.meta[PART]]
    if node.op == "call_module":
        return [*kinds, *(base.__name__ for base in type(root.get_submodule(str(node.target))).__mro__)]
    if node.op == "placeholder":
        return kinds
    return [*kinds, name_of(node), name_of(node).rstrip("_")]


def _name(graph: Graph) -> None:
    """Writes ``node.meta[NAME]``: see ``place``. A parameter is one place, however often it is read."""
    names: dict[Node, str] = {}
    for node in graph.nodes:
        if node.meta[PART] == "parameter":
            derived = _derived_name(f"{node.target}.") if node.op == "call_module" else None
            node.meta[NAME] = derived or str(node.target)
        elif node.meta[PART] in ("input", *LAYER_PARTS):
            is_named = node.op in ("call_module", "placeholder")
            names[node] = str(node.target) if is_named else ".".join(filter(None, [module_around(node), name_of(node)]))
    calls = Counter(name for node, name in names.items() if node.op != "placeholder")
    numbers: dict[str, Iterator[int]] = defaultdict(lambda: count(1))
    for node, name in names.items():
        if node.op == "placeholder":
            node.meta[NAME] = f"{name}@0" if name in calls else name
        else:
            # A module may itself be named relu@1.
            numbered = (f"{name}@{number}" for number in numbers[name])
            node.meta[NAME] = name if calls[name] == 1 else next(each for each in numbered if each not in calls)


def parameter_subjects(root: nn.Module) -> dict[str, tuple[Subject, ...]]:
    """First name -> what a recipe's patterns see of each parameter: all its names, with the kinds of their layers."""
    names: dict[int, str] = {id(parameter): name for name, parameter in root.named_parameters()}
    subjects: dict[str, list[Subject]] = {name: [] for name in names.values()}
    for path, module in root.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{path}.{name}" if path else name
            aliases = [full]
            if derived := _derived_name(full):  # ``fc.weight`` is made of it: what names that, names it
                module = root.get_submodule(derived.rpartition(".")[0])
                aliases.append(derived)
            part = next((_PART_OF[base.__name__] for base in _layer_bases(module)), "parameter")
            kinds = [part, *(base.__name__ for base in type(module).__mro__)]
            subjects[names[id(parameter)]] += [(alias, kinds) for alias in aliases]
    return {name: tuple(each) for name, each in subjects.items()}


# ``fc.parametrizations.weight.original0``: the layer, a dot behind its name, and the tensor derived from the parameter.
_DERIVED = re.compile(r"((?:.+\.)?)parametrizations\.([^.]+)\.")


def _derived_name(parameter: str) -> str | None:
    """``fc.weight``, of ``fc.parametrizations.weight.original0``; None if nothing is derived from ``parameter``."""
    return derived[1] + derived[2] if (derived := _DERIVED.match(parameter)) else None


def originals(root: nn.Module) -> tuple[str, ...]:
    """First names of the parameters that a parametrization derives weights from."""
    return tuple(name for name, _ in root.named_parameters() if _DERIVED.match(name))


def is_derived(node: Node, root: nn.Module) -> bool:
    """Whether ``node`` is what a parametrization derives from parameters: a weight, if no parameter."""
    if node.op != "call_module" or not isinstance(module := root.get_submodule(str(node.target)), ParametrizationList):
        return False
    return any(True for _ in module.parameters())


def classify(graph: Graph, root: nn.Module) -> Graph:
    """Writes ``node.meta[PART]`` on every node, and ``node.meta[NAME]`` on every place; returns ``graph``.

    x = placeholder                  input
    conv = self.conv(x)              compute
    relu = torch.relu(conv)          activation
    add = relu + self.bias           arithmetic   (self.bias: parameter)
    n = x.size(0)                    number
    flat = add.view(n, -1)           movement
    fc = self.fc(flat)               compute
    view = fc.view(n, 2, -1)         exit
    return view                      output
    """
    parameters = {id(parameter) for parameter in root.parameters()}
    filled = _filled(graph, root)
    for node in graph.nodes:
        part = _part(node, root, parameters)
        node.meta[PART] = "movement" if part == "number" and node in filled else part
    _mark_updates(graph, root)
    for node in reversed(graph.nodes):
        leaves = node.users and all(user.meta[PART] in ("exit", "output") for user in node.users)
        if leaves and node.meta[PART] in ("movement", "number"):
            node.meta[PART] = "exit"
    _name(graph)
    return graph


def _filled(graph: Graph, root: nn.Module) -> set[Node]:
    """Fresh constants that numbers are then written into, as in ``y = torch.zeros_like(x); y[0] = x[1]``."""
    filled = set()
    for node in graph.nodes:
        if writes(node, root) and len(node.all_input_nodes) > 1:
            filled.add(_written(node))
    return filled


def _mark_updates(graph: Graph, root: nn.Module) -> None:
    """``self.mean = self.mean * 0.9 + new * 0.1``: what a buffer is set to is as little rounded as what is written into
    it in place, before and after. These are sums and products that read the buffer and serve nothing else on their way
    to the write."""
    written = {node.args[2] for node in graph.find_nodes(op="call_function", target=setattr)}
    for node in reversed(graph.nodes):
        is_call = node.op in ("call_function", "call_method")
        if is_call and node.meta[PART] == "arithmetic" and node.users and written.issuperset(node.users):
            written.add(node)
    for node in graph.nodes:
        reads_state = any(source.meta[PART] == "state" for source in node.all_input_nodes)
        is_update = node in written and reads_state
        if node.meta[PART] == "arithmetic" and (is_update or _writes_state(node, root)):
            node.meta[PART] = "state"


def _part(node: Node, root: nn.Module, parameters: set[int]) -> str:
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    if node.op == "get_attr":
        value = attribute(root, str(node.target))
        if id(value) in parameters:
            return "parameter"
        return "state" if isinstance(value, torch.Tensor) else "number"
    if node.target is setattr or _writes_state(node, root):
        return "state"
    if is_derived(node, root):
        return "parameter"
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    sources = node.all_input_nodes
    if sources and not _has_parameters(module) and all(source.meta[PART] == "number" for source in sources):
        return "number"
    if module is not None:
        return _part_of_module(module)
    if node.op == "call_function" and not is_torch(node.target):
        return "movement" if isinstance(node.target, type) else "arithmetic"  # a tuple or a record with names
    name = name_of(node)
    return _PART_OF.get(name) or _PART_OF.get(name.rstrip("_")) or "arithmetic"


def _part_of_module(module: nn.Module) -> str:
    for base in _layer_bases(module):
        return _PART_OF[base.__name__]
    return "compute" if _has_parameters(module) else "arithmetic"


def is_listed(node: Node, module: nn.Module | None) -> bool:
    """Whether a line of PARTS names what ``node`` calls, which is ``module`` if it calls one."""
    if module is not None:
        return any(True for _ in _layer_bases(module))
    return name_of(node).rstrip("_") in _PART_OF


def _has_parameters(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.parameters())


def _layer_bases(module: nn.Module) -> Iterator[type]:
    for base in type(module).__mro__:
        if base.__module__.startswith(("torch.nn.", "torchvision.ops")) and base.__name__ in _PART_OF:
            yield base


def is_torch(function: Any) -> bool:
    """Whether ``function`` is one of PyTorch's or Python's own."""
    module = getattr(function, "__module__", None)
    return module is None or module.split(".")[0] in _TORCH


def _writes_state(node: Node, root: nn.Module) -> bool:
    """Whether ``node`` writes into a buffer or a slice of one: a fresh tensor after it would lose the next write."""
    if not (writes_in_place(node, root) or name_of(node) in IN_PLACE_OPERATORS) or not node.args:
        return False
    written = _written(node)
    return isinstance(written, Node) and written.meta[PART] == "state"


def _written(node: Node) -> Any:
    """What ``node`` writes into, or into an item of."""
    written = node.args[0]
    while isinstance(written, Node) and name_of(written) == "getitem":
        written = written.args[0]
    return written


def attribute(root: nn.Module, target: str) -> Any:
    """What ``target`` names under ``root``, or None: constants of the trace are no attributes of the model."""
    value: Any = root
    for name in target.split("."):
        value = getattr(value, name, None)
    return value
