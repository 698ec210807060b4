"""``measure``: the rounding error of a converted model, site by site."""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset

from .. import nodes
from ..capture import Rewritten, local
from ..capture.trial import untouched
from ..formats import FLOAT
from ..ops import quantize
from ..passes.names import place
from ..passes.rounding import ACTIVATION, ERROR, WEIGHT, Rounding
from ..random import error_stream, tensor_stream
from ..recipe import LETTERS, Quantizer
from .files import written
from .graphs import conversion_in, inlined
from .table import table

__all__ = ["Measures", "Rounded", "measure"]


@dataclass
class Rounded:
    """The error and the counts of one site in one role, over all batches."""

    format: str
    values: int = 0
    signal: float = 0.0  # sum of squares of the finite values
    noise: float = 0.0  # sum of squares of their rounding errors
    clipped: int = 0  # finite values beyond the range of the format, of their block's scale, or of x's dtype
    zeroed: int = 0  # nonzero values that became zero
    nan: int = 0
    infinite: int = 0  # before rounding, or after it in a format that overflows to infinity

    @property
    def sqnr(self) -> float:
        """The ratio of signal to quantization noise, in dB: about 6 a bit. Infinite if nothing was lost."""
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else math.inf

    def add(self, x: Tensor, q: Tensor) -> None:
        """Count ``x``, which was rounded to ``q``."""
        finite = x.isfinite() & q.isfinite()
        exact, rounded = torch.where(finite, x, 0).double(), torch.where(finite, q, 0).double()
        # Rounding up gives at least x, and rounding down at most x, unless x is out of range.
        above, below = (quantize(x, self.format, rounding).double() for rounding in ("up", "down"))
        self.values += x.numel()
        self.signal += exact.square().sum().item()
        self.noise += (rounded - exact).square().sum().item()
        self.clipped += int((finite & ((above < exact) | (below > exact))).sum())
        self.zeroed += int((finite & (x != 0) & (q == 0)).sum())
        self.nan += int(x.isnan().sum())
        self.infinite += int((x.isinf() | q.isinf()).sum())


class Measures(dict[tuple[str, str], Rounded]):
    """(site, role) -> Rounded, in the order of the graph; printed as a table of at most 100 columns.

    A site is a parameter or a layer's output, by the name that ``report`` prints and a recipe's rules take. A role is
    W, A or E, or its name: ``measures["layer1.0.relu@2", "activation"]``. The columns of NaNs and infinities are
    printed only if there are some.
    """

    def __missing__(self, key: object) -> Rounded:
        if self._known(key) in self:
            return self[self._known(key)]
        site = key[0] if isinstance(key, tuple) and key else key
        nearest = difflib.get_close_matches(str(site), dict.fromkeys(site for site, _ in self), n=3, cutoff=0)
        near = ", ".join(nearest) or "none"
        raise KeyError(f"there is no measure of {key!r}; use (name, role), the nearest names being {near}")

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self._known(key))

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(self._known(key), default)

    def _known(self, key: Any) -> Any:
        """``key`` with its role as a letter."""
        return (key[0], LETTERS.get(key[1], key[1])) if isinstance(key, tuple) and len(key) == 2 else key

    def sorted(self, by: str = "sqnr") -> Measures:
        """The same measures, the worst first; equal ones keep their order.

        by: "sqnr", from the lowest; "clipped", "zeroed", "nan" or "infinite", from the largest share of the values;
            "values", "signal" or "noise", from the largest.

        Raises ValueError for another column.
        """
        if by not in ORDERS:
            raise ValueError(f"cannot sort measures by {by!r}; use one of {', '.join(ORDERS)}")
        return Measures(sorted(self.items(), key=lambda item: ORDERS[by](item[1])))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """A list with an object for each measure; also written to ``path`` if given.

        Its keys: site, role, format, values, sqnr (dB), clipped, zeroed, nan, infinite (counts), signal, noise (sums of
        squares). The SQNR of an exact site is infinite. JSON has no infinity, so it is the string "inf"; ``float()``
        reads it.
        """
        rows = [{name: _finite(value) for name, value in row.items()} for row in self._rows()]
        return written(json.dumps(rows, indent=1, allow_nan=False) + "\n", path)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """A header and a line for each measure, with the columns of ``to_json``; infinity is inf.

        Also written to ``path`` if given.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows())
        return written(text.getvalue(), path)

    def _rows(self) -> list[dict[str, Any]]:
        rows = ({"site": site, "role": role, "sqnr": each.sqnr} | asdict(each) for (site, role), each in self.items())
        return [{name: row[name] for name in COLUMNS} for row in rows]

    def __str__(self) -> str:
        counts = [name for name in ("nan", "infinite") if any(getattr(each, name) for each in self.values())]
        rows = [
            [
                site,
                role,
                each.format,
                f"{each.values:,}",
                "exact" if each.sqnr == math.inf else f"{each.sqnr:.1f}",
                _share(each.clipped, each.values),
                _share(each.zeroed, each.values),
                *(f"{count:,}" if (count := getattr(each, name)) else "" for name in counts),
            ]
            for (site, role), each in self.items()
        ]
        titles = ("NaN" if name == "nan" else name for name in counts)
        header = ["site", "role", "format", "values", "SQNR, dB", "clipped", "to zero", *titles]
        return table(header, rows, numbers=len(header) - 3)

    __repr__ = __str__


COLUMNS = (
    "site", "role", "format", "values", "sqnr", "clipped", "zeroed", "nan", "infinite", "signal", "noise",
)  # fmt: skip

# Column -> the sort key of ``Measures.sorted``: the smallest is the worst.
ORDERS: dict[str, Callable[[Rounded], float]] = {
    "sqnr": lambda each: each.sqnr,
    "clipped": lambda each: -each.clipped / each.values,
    "zeroed": lambda each: -each.zeroed / each.values,
    "nan": lambda each: -each.nan / each.values,
    "infinite": lambda each: -each.infinite / each.values,
    "values": lambda each: -each.values,
    "signal": lambda each: -each.signal,
    "noise": lambda each: -each.noise,
}


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def measure(module: nn.Module, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor] | None = None) -> Measures:
    """The rounding error of each parameter (W) and layer output (A) of ``module``, over ``batches``.

    With ``loss``, of each error signal (E) too: ``print(swalp_fx.measure(lp, [(x, y)], F.cross_entropy))``.

    batches: inputs, or tuples or lists with the input first; on the module's device. With ``loss``, pairs of input and
        targets.

    loss: a function of (outputs, targets) that returns a scalar.

    The module runs in its present mode, with the random bits that a forward would draw now. Its buffers, gradients,
    plain attributes and the random state are restored afterwards. Hooks run as usual. Under activation checkpointing,
    a recomputed value counts once.

    Raises ConvertError for a module that is not converted, and ValueError if there is no batch. Raises TypeError for a
    tensor or a dataset in place of batches, and for a batch that is no pair if ``loss`` is given.
    """
    conversion = conversion_in(module, "measure")
    if isinstance(batches, Tensor):
        raise TypeError("measure takes batches, and would take the rows of a tensor for them; put it in a list: [x]")
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise TypeError(f"measure takes batches, and a {type(batches).__name__} gives samples; put it in a DataLoader")
    watch = _Watch()
    is_empty = True
    with untouched(conversion.root), watch.held(), torch.enable_grad() if loss else contextlib.nullcontext():
        for batch in batches:
            is_empty = False
            is_pair = isinstance(batch, tuple | list) and len(batch) == 2
            if loss is not None and not is_pair:
                raise TypeError(f"a loss needs batches of (inputs, targets), not a {type(batch).__name__}")
            outputs = module(batch[0] if isinstance(batch, tuple | list) else batch)
            if loss is not None:
                watch.is_backward = True
                loss(outputs, batch[1]).backward()
                watch.is_backward = False
    if is_empty:
        raise ValueError("measure got no batch; pass a list or a DataLoader, not an iterator that has been read")
    return Measures({key: each for key, each in watch.measures.items() if each.values})


class _Watch:
    """Interprets graphs in place of their code, and counts the numbers that their nodes round."""

    def __init__(self) -> None:
        self.measures = Measures()
        self.is_backward = False  # a forward that runs now is recomputed, and has been counted
        self._graphs: dict[int, tuple[Rewritten, GraphModule]] = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A context: within it, the graphs of this thread run here."""
        before, local.watch = local.watch, self.run
        try:
            yield
        finally:
            local.watch = before

    def run(self, made: Rewritten, args: tuple[Any, ...]) -> Any:
        if id(made) not in self._graphs:
            self._graphs[id(made)] = made, inlined(made.graph_module, steps=False)
            self._begin(inlined(made.graph_module).graph)
        return _Run(self, self._graphs[id(made)][1]).run(*args)

    def _begin(self, graph: Graph) -> None:
        """Lists the sites of a graph, in its order."""
        for rounding in Rounding.all(graph):
            for role, spec in rounding.quantizers.items():
                if spec != str(FLOAT):
                    format = str(Quantizer.parse(spec).format)
                    self.measures.setdefault((place(rounding.source), role), Rounded(format))

    def count(self, rounding: Rounding, role: str, x: Tensor, q: Tensor) -> None:
        rounded = self.measures.get((place(rounding.source), role))
        if rounded is not None and (role == "E" or not self.is_backward):
            rounded.add(x.detach(), q.detach())


class _Run(Interpreter):
    """One run of a graph."""

    def __init__(self, watch: _Watch, module: GraphModule) -> None:
        super().__init__(module)
        self.watch = watch

    def run_node(self, n: Node) -> Any:
        if n.target is nodes.recurrent:
            (body, *args), how = self.fetch_args_kwargs_from_env(n)
            return nodes.recurrent(_Run(self.watch, body).run, *args, **how)
        if (rounding := Rounding.of(n)) is None:
            return super().run_node(n)
        given: Any = self.map_nodes_to_values((rounding.source, rounding.key), n)
        x, key = given
        before = pytree.tree_map_only(Tensor, torch.clone, x)  # rounding may be in place
        result = super().run_node(n)
        role = WEIGHT if WEIGHT in rounding.quantizers else ACTIVATION
        pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(result), strict=True)
        for i, (exact, rounded) in enumerate(pairs):
            if isinstance(exact, Tensor) and exact.is_floating_point():
                self.watch.count(rounding, role, exact, rounded)
                if role == ACTIVATION and rounded.requires_grad:
                    stream = error_stream(tensor_stream(rounding.stream, i))
                    rounded.register_hook(self._count_error(rounding, key, stream))
        return result

    def _count_error(self, rounding: Rounding, key: Tensor | None, stream: int) -> Callable[..., None]:
        format, how = nodes.how(rounding.quantizers[ERROR], rounding.rounding, key)

        def hook(error: Tensor) -> None:
            # The node's backward is about to round the same, with the same random bits.
            self.watch.count(rounding, ERROR, error, quantize(error, format, how, key=key, stream=stream))

        return hook


def _share(count: int, values: int) -> str:
    return f"{count / values:.2%}" if count else ""
