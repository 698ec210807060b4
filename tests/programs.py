"""Small random programs that write into their tensors in every way: a forward as text, the same for a seed."""

import random

import torch
import torch.nn.functional as F
from torch import nn

SIZE = 4
# {0} and {1} are tensors of one shape: whole ones of [4, 4], or halves of [2, 4].
WHOLE = ("{0}.t()", "{0}.view(4, 4)", "torch.einsum('ij->ji', {0})")
HALVES = ("{0}[1:3]", "{0}.narrow(0, 0, 2)", "{0}.chunk(2)[1]", "{0}.split(2)[0]")
READS = (
    "self.layers[{2}]({0})",
    "self.layers[{2}]({0})",
    "{0}.relu()",
    "{0} + {1}",
    "{0} * 0.5",
    "{0}.clone()",
    "{0}.detach()",
    "{0}[:]",
    "{0}.contiguous()",
    "{0}.float()",
    "F.dropout({0}, 0.5, False)",
    "torch.where({0} > 0, {1}, 0.25)",
    "torch.zeros_like({0})",
    "{0}.flip(0)",
)
WRITES = (
    "{0} += {1}",
    "{0} *= 0.5",
    "{0}.add_({1})",
    "{0}.mul_(0.5)",
    "{0}.relu_()",
    "F.relu({0}, inplace=True)",
    "{0}[:, 0] = 3.0",
    "{0}[0] = {1}[1]",
    "{0}[:, 1:] += 1.0",
    "{0}[{0} > 0] = -1.0",
    "{0}.copy_({1})",
    "{0}[:, :2].copy_({1}[:, 2:])",
    "{0}.narrow(1, 0, 2).fill_(0.25)",
    "{0}.select(1, 3).zero_()",
    "{0}.view(-1).sub_(0.5)",
    "{0}.masked_fill_({0} > 0, 0.75)",
    "{0}.masked_scatter_({1} > 0, {1})",
    "{0}.index_fill_(0, torch.tensor([1]), 1.5)",
    "{0}.index_put_((torch.tensor([0, 1]),), torch.tensor(0.5))",
    "{0}.index_add_(0, torch.tensor([0]), {1}[:1])",
    "{0}.scatter_(1, torch.tensor([[0], [2]]), -0.5)",
    "{0}.__iadd__({1})",
    "torch.mul({0}, {1}, out={0})",
    "torch._foreach_mul_([{0}, {1}], 0.5)",
    "torch._foreach_add_([{0}[0], {0}[1]], 1.0)",
    "{0}.data.mul_(0.5)",
    "{0}.detach()[0].zero_()",
)
TAKEN = ("{} = {}.add_({})", "{} = {}.mul_({})", "{} = {}.relu_().mul_({})", "{} = {}.copy_({})")


def program(seed: int, length: int = 8) -> str:
    """The text of a forward of ``x``, [4, 4], with writes in the middle. It returns one to three tensors."""
    draw = random.Random(seed)
    shapes = {"x": "whole", "t0": "whole"}
    lines = ["t0 = self.layers[0](x)"]
    for number in range(1, length + 1):
        given = draw.choice(list(shapes)[-4:])
        other = draw.choice([name for name, shape in shapes.items() if shape == shapes[given]])
        kind = draw.random()
        if kind < 0.45:
            lines.append(draw.choice(WRITES).format(given, other))
        elif kind < 0.55:
            lines.append(draw.choice(TAKEN).format(f"t{number}", given, other))
            shapes[f"t{number}"] = shapes[given]
        else:
            halved = shapes[given] == "whole" and draw.random() < 0.3
            reads = HALVES if halved else (*READS, *(WHOLE if shapes[given] == "whole" else ()))
            lines.append(f"t{number} = " + draw.choice(reads).format(given, other, draw.randrange(2)))
            shapes[f"t{number}"] = "half" if halved else shapes[given]
    given = [f"self.layers[1]({name})" if draw.random() < 0.3 else name for name in draw.sample(list(shapes), 2)]
    return "\n    ".join(["def forward(self, x):", *lines, f"return {', '.join(given)},"])


class Program(nn.Module):
    """A module with that forward, of the text or of a function of (module, x)."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(2))
        self.register_buffer("table", torch.zeros(SIZE, SIZE))
        self.text = forward
        if isinstance(forward, str):
            scope = {"torch": torch, "F": F}
            exec(compile(forward, f"<program {hash(forward)}>", "exec"), scope)
            self.code = scope["forward"]
        else:
            self.code = forward

    def forward(self, x):
        return self.code(self, x)
