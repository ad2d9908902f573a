"""LayerNorm whose derivatives are right to every order under `vmap`."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["LayerNorm"]


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, with the same arguments and `state_dict`, for use under `torch.func`.

    PyTorch's own operation has a wrong second derivative in `grad(vmap(... grad ...))` if it has weights, without an
    error (seen in 2.13): a loop over the tasks and finite differences give another number. Written with elementary
    operations, every derivative is right.
    """

    def forward(self, input: Tensor) -> Tensor:
        axes = tuple(range(-len(self.normalized_shape), 0))
        centred = input - input.mean(axes, keepdim=True)
        y = centred * (centred.square().mean(axes, keepdim=True) + self.eps).rsqrt()
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias
