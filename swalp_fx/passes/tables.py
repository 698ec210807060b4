"""The table of operations: the part of each, and its effects. It is the whole rule of which outputs are quantized."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import translate
from functools import cache
from itertools import chain

import torch

__all__ = [
    "LAYER_PARTS",
    "OPERATIONS",
    "PARTS",
    "PROBABILITIES",
    "SCORES",
    "Operation",
    "does",
    "is_product",
    "layer_part",
    "may_name_function",
    "part_of",
]


@dataclass(frozen=True)
class Operation:
    """One row of the table.

    part: its category; see TABLE.
    does:
        own     its output is in memory of its own, and its derivative does not need that
        regrad  its derivative makes the gradient of its first input in memory of its own
        masks   keeps each number of its first input or makes it zero; backward it does so with the gradient
        selects passes on numbers of its input, each within its index of the first dimension, in the same dtype
        adds    writes a sum into its first input, keeps nothing of it, and returns it
        writes  writes into its first input, though its name does not end with ``_``
        views   may give the memory of its first input
        reads   gives a number made of the values of its inputs, not of sizes alone
        multiplies  outside of graphs it may run as ``mul``, element by element
        spreads     outside of graphs it may run as ``mul`` of operands that are spread over each other's axes
    """

    part: str
    does: frozenset[str] = frozenset()


# Each line: part | does | names. Operations with the same facts share a line.
# A name is of a function, a method or a type of layer; a subclass of the type has its part. An in-place form without a
# row (``gelu_``) has the part of the other form, and none of its effects.
TABLE = """
# Sums of products: what hardware spends its multipliers on.
compute | own regrad | linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul mm bmm
compute | own | bilinear embedding mv
compute | | deform_conv2d embedding_bag dot vdot inner tensordot addmm addmv addbmm baddbmm addr conv_tbc imatmul
compute | multiplies | einsum linalg_vecdot
compute | spreads | outer ger kron
compute | | linalg_matmul chain_matmul linalg_multi_dot matrix_power linalg_matrix_power matrix_exp linalg_matrix_exp
compute | | ormqr sparse_mm sparse_addmm sparse_sampled_addmm spmm smm saddmm sspaddmm hspmm hsmm dsmm
compute | | foreach_mm scaled_mm grouped_mm scaled_grouped_mm int_mm
compute | | convolution scaled_dot_product_attention _native_multi_head_attention _transformer_encoder_layer_fwd
compute | | lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
compute | | cdist Linear Bilinear _ConvNd Conv1d
compute | | Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d DeformConv2d Embedding EmbeddingBag
compute | | MultiheadAttention RNNBase RNNCellBase Transformer TransformerEncoder TransformerDecoder
compute | | TransformerEncoderLayer TransformerDecoderLayer

# Words in the names of PyTorch's kernels that compute such sums, and names of no function.
kernel | | attention rnn trilinear conv

norm | own regrad | batch_norm layer_norm group_norm
norm | | instance_norm rms_norm local_response_norm normalize native_batch_norm native_layer_norm native_group_norm
norm | | _NormBase LayerNorm GroupNorm RMSNorm LocalResponseNorm CrossMapLRN2d FrozenBatchNorm2d

activation | masks regrad | relu relu_
activation | own regrad | gelu silu mish hardswish leaky_relu
activation | regrad | relu6 sigmoid tanh
activation | | rrelu prelu elu selu celu glu softplus softsign softmin softmax _safe_softmax log_softmax logsigmoid
activation | | log_sigmoid tanhshrink hardtanh hardsigmoid hardshrink softshrink threshold clamp clamp_min clamp_max
activation | | clip ReLU RReLU ReLU6 LeakyReLU PReLU ELU SELU CELU GELU GLU SiLU Mish Softplus Softsign Softmin
activation | | Softmax Softmax2d LogSoftmax Sigmoid LogSigmoid Tanh Tanhshrink Hardtanh Hardsigmoid Hardswish Hardshrink
activation | | Softshrink Threshold

# And every call that no line names: a number that no rule knows is still a number.
arithmetic | own | add sub
arithmetic | own regrad | mul
arithmetic | | div truediv rsub pow neg abs exp log sqrt rsqrt reciprocal square sin cos addcmul addcdiv lerp
arithmetic | | true_divide subtract multiply
arithmetic | adds | add_ sub_
arithmetic | adds writes | iadd isub
arithmetic | writes | imul itruediv ipow ifloordiv imod

pooling | selects regrad | max_pool1d max_pool2d
pooling | selects | adaptive_max_pool1d adaptive_max_pool2d
pooling | regrad | max_pool3d
pooling | own regrad | avg_pool1d avg_pool2d avg_pool3d
pooling | own | adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
pooling | | max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool3d lp_pool1d
pooling | | adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices
pooling | | fractional_max_pool2d fractional_max_pool3d fractional_max_pool2d_with_indices
pooling | | fractional_max_pool3d_with_indices lp_pool2d lp_pool3d interpolate upsample upsample_nearest
pooling | | upsample_bilinear grid_sample mean sum amax amin max min maximum minimum fmax fmin cummax cummin median
pooling | | nanmedian mode kthvalue aminmax _MaxPoolNd _AvgPoolNd _AdaptiveMaxPoolNd _AdaptiveAvgPoolNd _LPPoolNd
pooling | | FractionalMaxPool2d FractionalMaxPool3d Upsample RoIAlign RoIPool PSRoIAlign PSRoIPool MultiScaleRoIAlign

# The same numbers elsewhere, or some of them, or zeros between them.
movement | views | getitem data _get_data_attr register_hook detach alias view view_as reshape reshape_as flatten
movement | views | unflatten ravel squeeze unsqueeze t T mT H mH numpy_T matrix_H transpose adjoint swapaxes swapdims
movement | views | movedim moveaxis permute narrow select slice diagonal chunk split split_with_sizes tensor_split
movement | views | hsplit vsplit dsplit unsafe_split unsafe_chunk unbind unfold expand expand_as broadcast_to
movement | views | broadcast_tensors real imag view_as_real view_as_complex as_strided conj positive resolve_conj
movement | views | resolve_neg atleast_1d atleast_2d atleast_3d linalg_diagonal
# These too, where there is nothing to do.
movement | views | alpha_dropout feature_alpha_dropout conj_physical meshgrid
movement | views | contiguous to type type_as float double half bfloat16 cfloat cdouble chalf cpu cuda dropout
movement | views | dropout1d dropout2d dropout3d requires_grad_
movement | own regrad | masked_fill
movement | writes | setitem
movement | | cat concat concatenate stack hstack vstack dstack column_stack row_stack _squeeze _unsqueeze repeat
movement | | repeat_interleave tile index_select gather take take_along_dim roll flip fliplr flipud rot90 pad
movement | | constant_pad_nd clone copy where masked_select tril triu
movement | | feature_dropout native_dropout stochastic_depth drop_block2d drop_block3d pixel_shuffle pixel_unshuffle
movement | | channel_shuffle fold topk sort msort fill zero scatter masked_scatter index_copy index_fill complex
movement | | fftshift ifftshift fft_fftshift fft_ifftshift block_diag cartesian_prod combinations diag diagflat
movement | | diag_embed max_unpool1d max_unpool2d max_unpool3d diagonal_scatter select_scatter slice_scatter
movement | | as_strided_scatter unsafe_view to_copy lift lift_fresh resize set view_copy alias_copy as_strided_copy
movement | | diagonal_copy expand_copy narrow_copy permute_copy select_copy slice_copy split_copy
movement | | split_with_sizes_copy squeeze_copy t_copy transpose_copy unbind_copy unfold_copy unsqueeze_copy
movement | | _chunk_cat native_dropout_backward detach_copy view_as_real_copy view_as_complex_copy Identity Flatten
movement | | Unflatten Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout StochasticDepth
movement | | DropBlock2d DropBlock3d Permute PixelShuffle PixelUnshuffle ChannelShuffle Fold Unfold _ConstantPadNd
movement | | _ReflectionPadNd _ReplicationPadNd _CircularPadNd _MaxUnpoolNd

# Sizes, indices, comparisons and fresh constants: not a layer's output. So is whatever is made of these alone.
number | | size sym_size dim ndim ndimension numel nelement shape stride len dtype device layout is_cuda requires_grad
number | | is_floating_point is_complex is_contiguous is_nested training get_device Size _assert warn zeros ones full
number | | empty arange linspace eye zeros_like ones_like full_like empty_like scalar_tensor rand randn randint
number | | randperm rand_like randn_like randint_like uniform new_zeros new_ones new_full new_empty new_empty_strided
number | | is_grad_enabled _set_grad_enabled _enter_autocast _exit_autocast _enter_inference_mode _exit_inference_mode
number | reads | item eq ne lt le gt ge is_ is_not not_ and_ or_ xor invert logical_and logical_or logical_not
number | reads | logical_xor isnan isinf isfinite any all argmax argmin argsort nonzero bucketize searchsorted one_hot
number | reads | bincount long int bool bernoulli normal new_tensor tensor as_tensor
number | reads writes | iand ior ixor
"""


def _rows() -> Iterator[tuple[str, Operation]]:
    for line in TABLE.splitlines():
        if line and not line.startswith("#"):
            part, does, names = line.split("|")
            for name in names.split():
                yield name, Operation(part.strip(), frozenset(does.split()))


OPERATIONS = {name: row for name, row in _rows() if row.part != "kernel"}
_KERNELS = frozenset(name for name, row in _rows() if row.part == "kernel")
# Part -> the names of its operations.
PARTS: dict[str, list[str]] = {}
for _name, _row in OPERATIONS.items():
    PARTS.setdefault(_row.part, []).append(_name)

# The names of attention's outputs before its result.
SCORES, PROBABILITIES = "attn_scores", "attn_probabilities"

# Parts whose output is a layer's output.
LAYER_PARTS = ("compute", "norm", "activation", "arithmetic", "pooling")


def does(name: str) -> frozenset[str]:
    """The effects of a function or method, by its row: see ``Operation``."""
    return OPERATIONS[name].does if name in OPERATIONS else frozenset()


def part_of(name: str) -> str | None:
    """The part of a function or method, by its name; None if the table does not have it."""
    row = OPERATIONS.get(name) or OPERATIONS.get(name.strip("_"))
    return row.part if row is not None else None


def is_product(kernel: str) -> bool:
    """Whether an operation of PyTorch's computes sums of products, by a word of its name: ``_sparse_addmm`` does."""
    words = kernel.strip("_").split("_")
    return part_of(kernel) == "compute" or any(word in _KERNELS or part_of(word) == "compute" for word in words)


def layer_part(kind: type) -> str | None:
    """The part of layers of this type, or of its nearest base that is PyTorch's and in the table; else None."""
    return next((OPERATIONS[base.__name__].part for base in _listed(kind)), None)


def _listed(kind: type) -> Iterator[type]:
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.nn.", "torchvision.ops")) and base.__name__ in OPERATIONS:
            yield base


def may_name_function(pattern: str, modules: Collection[str]) -> bool:
    """Whether ``pattern`` may match the name of a function's output, or of a call, in ``modules``.

    Such names are ``layer1.0.relu@2`` and ``*.iadd``.
    """
    if pattern.startswith("re:"):
        if "@" in pattern:
            return True
        expression = re.compile(pattern[3:])
    else:
        expression = re.compile(translate(re.sub(r"@.*$", "", pattern)))
    calls = modules if "@" in pattern else ()
    names = (f"{path}.{name}" if path else name for path in ("", *modules) for name in _functions())
    return any(expression.fullmatch(name) for name in chain(calls, names))


_OWN = OPERATIONS.keys() | {SCORES, PROBABILITIES}


@cache
def _functions() -> frozenset[str]:
    homes = (torch, torch.nn.functional, torch.Tensor, operator)
    return frozenset(name for home in homes for name in dir(home) if not name.startswith("_")) | _OWN
