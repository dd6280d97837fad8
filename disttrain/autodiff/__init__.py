"""Automatic differentiation: Tensors, ops with their rules, gradients of gradients."""

from disttrain.autodiff import ops
from disttrain.autodiff.gradcheck import check_grads
from disttrain.autodiff.op import no_grad, op
from disttrain.autodiff.tensor import Tensor
from disttrain.autodiff.transform import grad, value_and_grad

__all__ = ["Tensor", "check_grads", "grad", "no_grad", "op", "ops", "value_and_grad"]
