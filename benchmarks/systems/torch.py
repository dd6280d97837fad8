"""PyTorch, eager: the best of its fused optimizer and of channels last."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.architecture import (
    EPSILON,
    MOMENTUM,
    Array,
    Attention,
    BatchNorm,
    Conv,
    Dense,
    Embedding,
    Flatten,
    GlobalMean,
    LayerNorm,
    MaxPool,
    Part,
    Residual,
)
from benchmarks.systems import Built
from benchmarks.workloads import Optimizer, Workload

PACKAGES = ("torch",)
PRECISION = "float32"

torch.set_num_threads(1)


def variants(workload: Workload) -> Sequence[str]:
    """Return "plain", "fused", and for images "fused, channels_last"."""
    return ("plain", "fused", "fused, channels_last") if len(workload.input_shape) == 4 else ("plain", "fused")


def build(workload: Workload, variant: str) -> Built:
    """Return the step: gradients set to None, forward, backward, optimizer; "compiled" compiles the loss."""
    model = nn.Sequential(*_modules(workload.parts, workload.weights()))
    inputs, targets = workload.batch()
    x, y = torch.from_numpy(inputs), torch.from_numpy(targets).flatten()
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2).contiguous()
    if "channels_last" in variant:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    optimizer = _optimizer(workload.optimizer, model, fused="fused" in variant)

    def loss_of(x: Any, y: Any) -> Any:
        return functional.cross_entropy(model(x).flatten(0, -2), y)

    if "compiled" in variant:
        loss_of = torch.compile(loss_of)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Built(step=step, parameters=sum(p.numel() for p in model.parameters()))


def product(a: Array, b: Array) -> Array:
    """Return ``a @ b``."""
    result: Array = (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()
    return result


def _optimizer(rule: Optimizer, model: Any, *, fused: bool) -> Any:
    if rule.name == "sgd":
        return torch.optim.SGD(model.parameters(), rule.learning_rate, rule.momentum, fused=fused)
    if rule.name == "adamw":
        return torch.optim.AdamW(model.parameters(), rule.learning_rate, weight_decay=rule.weight_decay, fused=fused)
    return torch.optim.Adam(model.parameters(), rule.learning_rate, fused=fused)


def _modules(parts: Sequence[Part], weights: Iterator[Array]) -> list[Any]:
    """Return the modules of `parts`, which take their weights from the iterator."""
    modules: list[Any] = []
    image: tuple[int, ...] | None = None  # what a Flatten before this part has flattened
    for part in parts:
        match part:
            case Dense():
                kernel = next(weights)
                if image:  # its rows are channels last, torch's images channels first
                    kernel = kernel.reshape(*image, part.units).transpose(2, 0, 1, 3).reshape(kernel.shape)
                dense = nn.Linear(part.inputs, part.units, bias=part.use_bias)
                modules.append(_filled(dense, kernel.T, next(weights) if part.use_bias else None))
            case Conv():
                conv = nn.Conv2d(part.channels, part.filters, part.size, part.stride, part.padding, bias=part.use_bias)
                kernel = next(weights).transpose(3, 2, 0, 1)
                modules.append(_filled(conv, kernel, next(weights) if part.use_bias else None))
            case BatchNorm():
                norm = nn.BatchNorm2d(part.channels, EPSILON, 1 - MOMENTUM)
                modules.append(_filled(norm, next(weights), next(weights)))
            case LayerNorm():
                modules.append(_filled(nn.LayerNorm(part.width, EPSILON), next(weights), next(weights)))
            case MaxPool():
                modules.append(nn.MaxPool2d(part.size))
            case Flatten():
                modules.append(nn.Flatten())
            case GlobalMean():
                modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            case Embedding():
                modules.append(_Embedding(next(weights), next(weights)))
            case Attention():
                modules.append(_Attention(part, [next(weights) for _ in part.shapes()]))
            case Residual():
                modules.append(_Residual(_modules(part.branch, weights), _modules(part.shortcut, weights)))
        image = part.shape if isinstance(part, Flatten) else None
        modules += {"relu": [nn.ReLU()], "gelu": [nn.GELU("tanh")]}.get(getattr(part, "activation", None) or "", [])
    return modules


def _filled(module: Any, weight: Array, bias: Array | None) -> Any:
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight))
        if bias is not None:
            module.bias.copy_(torch.from_numpy(bias))
    return module


class _Embedding(nn.Module):
    def __init__(self, positions: Array, tokens: Array) -> None:
        super().__init__()
        self.tokens = nn.Embedding(*tokens.shape, _weight=torch.from_numpy(tokens))
        self.positions = nn.Parameter(torch.from_numpy(positions))

    def forward(self, x: Any) -> Any:
        return self.tokens(x) + self.positions


class _Attention(nn.Module):
    def __init__(self, part: Attention, arrays: list[Array]) -> None:
        super().__init__()
        self.heads = part.heads
        self.inner = _filled(nn.Linear(part.width, 3 * part.width), arrays[0].T, arrays[1])
        self.outer = _filled(nn.Linear(part.width, part.width), arrays[2].T, arrays[3])

    def forward(self, x: Any) -> Any:
        samples, length, width = x.shape
        split = self.inner(x).view(samples, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.outer(y.transpose(1, 2).reshape(samples, length, width))


class _Residual(nn.Module):
    def __init__(self, branch: list[Any], shortcut: list[Any]) -> None:
        super().__init__()
        self.branch, self.shortcut = nn.Sequential(*branch), nn.Sequential(*shortcut)

    def forward(self, x: Any) -> Any:
        return self.branch(x) + self.shortcut(x)
