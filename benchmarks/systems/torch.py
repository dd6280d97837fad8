"""PyTorch, eager: the best of its fused optimizer and of channels last."""

from collections.abc import Callable, Iterator, Sequence
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


def variants(workload: Workload, task: str) -> Sequence[str]:
    """Return "plain"; but for predictions "fused" as well, and for images that with "channels_last"."""
    is_image = len(workload.input_shape) == 4
    if task == "predict":
        return ("plain", "channels_last") if is_image else ("plain",)
    return ("plain", "fused", "fused, channels_last") if is_image else ("plain", "fused")


def build(
    workload: Workload,
    variant: str,
    *,
    wrapped: Callable[[Any], Any] = lambda model: model,
    part: Callable[[Array], Array] = lambda batch: batch,
) -> Built:
    """Return the model: a step sets gradients to None; "compiled" compiles the loss, and for predictions the model.

    Args:
        workload: what to build.
        variant: one of `variants`.
        wrapped: returns the model as it is trained.
        part: returns what of a batch this process trains on.
    """
    layout = torch.channels_last if "channels_last" in variant else torch.contiguous_format
    model = wrapped(module(workload).to(memory_format=layout))
    inputs, targets = map(part, workload.batch())
    size = len(inputs)
    optimizer = _optimizer(workload.optimizer, model, fused="fused" in variant)

    def given(x: Any) -> Any:
        return x.permute(0, 3, 1, 2).contiguous(memory_format=layout) if x.ndim == 4 else x

    def loss_of(x: Any, y: Any) -> Any:
        return functional.cross_entropy(model(x).flatten(0, -2), y)

    forward = model
    if "compiled" in variant:
        forward, loss_of = torch.compile(model), torch.compile(loss_of)

    def train(x: Any, y: Any) -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    x, y = given(torch.from_numpy(inputs)), torch.from_numpy(targets).flatten()

    def predict(x: Array) -> Array:
        model.eval()
        with torch.inference_mode():
            logits: Array = torch.cat([forward(given(part)) for part in torch.from_numpy(x).split(size)]).numpy()
        model.train()
        return logits

    def epoch(x: Array, y: Array) -> None:
        inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
        for rows in torch.randperm(len(inputs)).split(size):
            train(given(inputs[rows]), targets[rows])

    return Built(
        parameters=sum(p.numel() for p in model.parameters()), step=lambda: train(x, y), predict=predict, epoch=epoch
    )


def module(workload: Workload) -> Any:
    """Return the workload's model with its initial weights; images are channels first."""
    return nn.Sequential(*_modules(workload.parts, workload.weights()))


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
