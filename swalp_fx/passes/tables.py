"""Which operation plays which part. The table is the whole rule: read it to know what is quantized."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterator
from fnmatch import translate
from functools import cache
from itertools import chain

import torch

__all__ = ["LAYER_PARTS", "PARTS", "READS_VALUES", "layer_part", "may_name_function", "part_of"]

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
        _get_data_attr numpy_T matrix_H register_hook view_as_complex view_as_real complex
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

# Of the numbers, those that are made of the values they read, and not of sizes alone.
READS_VALUES = """
    eq ne lt le gt ge is_ is_not not_ and_ or_ xor invert logical_and logical_or logical_not logical_xor
    isnan isinf isfinite any all argmax argmin argsort nonzero bucketize searchsorted one_hot bincount long int bool
    bernoulli normal tensor as_tensor new_tensor item
"""

# Parts whose output is a layer's output.
LAYER_PARTS = ("compute", "norm", "activation", "arithmetic", "pooling")

_PART_OF = {name: part for part, names in PARTS.items() for name in names.split()}


def part_of(name: str) -> str | None:
    """The part that a function or method plays, by its name; None if no line has it."""
    return _PART_OF.get(name) or _PART_OF.get(name.rstrip("_"))


def layer_part(kind: type) -> str | None:
    """The part that layers of this type play; None if no line has it, or a base of it that is PyTorch's."""
    return next((_PART_OF[base.__name__] for base in _listed(kind)), None)


def _listed(kind: type) -> Iterator[type]:
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.nn.", "torchvision.ops")) and base.__name__ in _PART_OF:
            yield base


def may_name_function(pattern: str, modules: Collection[str]) -> bool:
    """Whether what a function gives in one of ``modules``, or one call of these, may have a name that ``pattern``
    matches: ``layer1.0.relu@2``, ``*.iadd``."""
    if pattern.startswith("re:"):
        if "@" in pattern:
            return True
        expression = re.compile(pattern[3:])
    else:
        expression = re.compile(translate(re.sub(r"@.*$", "", pattern)))
    calls = modules if "@" in pattern else ()
    names = (f"{path}.{name}" if path else name for path in ("", *modules) for name in _functions())
    return any(expression.fullmatch(name) for name in chain(calls, names))


@cache
def _functions() -> frozenset[str]:
    homes = (torch, torch.nn.functional, torch.Tensor, operator)
    return frozenset(name for home in homes for name in dir(home) if not name.startswith("_")) | _PART_OF.keys()
