"""Many small multilayer perceptrons of one shape, evaluated and trained as one: a batched matmul a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from modules.networks.products import fuses_tanh, linear_tanh

ACTIVATIONS = {
    "relu": (functional.relu_, math.sqrt(2.0)),  # in place: its input is a fresh product, which autograd does not keep
    "tanh": (torch.tanh, 5.0 / 3.0),
    "silu": (functional.silu, math.sqrt(2.0)),
    "gelu": (functional.gelu, math.sqrt(2.0)),
}
"""Name -> function and the gain that keeps its output's scale through a layer."""

_NARROW = 16
"""Outputs below which a product reads a transposed copy of the weights: 64 to 6 outputs took half the time on a CPU."""


class StackedMLP:
    """``L`` perceptrons of the same shape as a pure function of their stacked parameters.

    The object holds no parameters: :meth:`init` makes them, :meth:`apply` takes them. Layer ``i`` has ``weight_i``
    ``[L, in, out]`` (the transpose of ``nn.Linear``'s, so that no copy is made) and ``bias_i`` ``[L, out]``.

    Args:
        inputs: features of an input row.
        hidden: widths of the hidden layers; empty for a linear map.
        outputs: features of an output row.
        activation: ``relu``, ``tanh``, ``silu`` or ``gelu``, after every hidden layer.
        init: ``orthogonal`` (Saxe et al. 2014; zero biases) or ``kaiming`` (uniform, as ``nn.Linear`` starts).
        output_gain: factor on the last layer's initial weights; small for a policy that shall start near uniform.

    Raises:
        ValueError: for a width below 1, or an unknown activation or initialisation.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        activation: str = "relu",
        init: str = "orthogonal",
        output_gain: float = 1.0,
    ) -> None:
        widths = [inputs, *hidden, outputs]
        if min(widths) < 1:
            raise ValueError(f"StackedMLP: inputs, hidden, outputs: widths must be at least 1, got {widths}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"StackedMLP: activation: one of {', '.join(ACTIVATIONS)}, got '{activation}'")
        if init not in ("orthogonal", "kaiming"):
            raise ValueError(f"StackedMLP: init: orthogonal or kaiming, got '{init}'")
        self.widths = widths
        self.layers = len(widths) - 1
        self.activation = activation
        self.initialisation = init
        self.output_gain = output_gain
        self._function, self._gain = ACTIVATIONS[activation]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of one network, the leading ``[L]`` left out, in the order of the layers."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (fan_in, fan_out) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            shapes[f"weight_{layer}"] = (fan_in, fan_out)
            shapes[f"bias_{layer}"] = (fan_out,)
        return shapes

    def init(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh float32 parameters ``[count, ...]`` of ``count`` networks, on the generator's device."""
        device = generator.device
        params: dict[str, Tensor] = {}
        for layer in range(self.layers):
            fan_in, fan_out = self.widths[layer], self.widths[layer + 1]
            last = layer == self.layers - 1
            if self.initialisation == "orthogonal":
                tall = (count, max(fan_in, fan_out), min(fan_in, fan_out))
                normal = torch.randn(tall, generator=generator, device=device, dtype=torch.float64)
                basis, triangle = torch.linalg.qr(normal)
                # The sign fixes QR's freedom, so that the draw is uniform over orthogonal matrices (Mezzadri 2007).
                basis = basis * torch.diagonal(triangle, dim1=-2, dim2=-1).sign().unsqueeze(-2)
                weight = (basis if fan_in >= fan_out else basis.transpose(-2, -1)).float()
                weight = weight * (self.output_gain if last else self._gain)
                bias = torch.zeros(count, fan_out, device=device)
            else:
                bound = 1.0 / math.sqrt(fan_in)
                weight = torch.rand(count, fan_in, fan_out, generator=generator, device=device) * (2 * bound) - bound
                bias = torch.rand(count, fan_out, generator=generator, device=device) * (2 * bound) - bound
                if last:
                    weight, bias = weight * self.output_gain, bias * self.output_gain
            params[f"weight_{layer}"] = weight.contiguous()
            params[f"bias_{layer}"] = bias
        return params

    def apply(self, params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Outputs ``[L, rows, outputs]``; differentiable in parameters and inputs.

        Args:
            params: as :meth:`init` makes them, ``[L, ...]`` each.
            inputs: ``[rows, inputs]``, seen by all networks alike, or ``[L, rows, inputs]``, each its own.
        """
        count = params["weight_0"].shape[0]
        rows = inputs.expand(count, *inputs.shape) if inputs.ndim == 2 else inputs
        for layer in range(self.layers):
            weight = params[f"weight_{layer}"]
            hidden = layer < self.layers - 1
            if hidden and count == 1 and self.activation == "tanh" and fuses_tanh(rows[0], weight[0]):
                rows = linear_tanh(rows[0], weight[0], params[f"bias_{layer}"][0]).unsqueeze(0)
                continue
            if weight.shape[-1] < _NARROW and weight.device.type == "cpu":
                weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
            rows = torch.baddbmm(params[f"bias_{layer}"].unsqueeze(1), rows, weight)
            if hidden:
                rows = self._function(rows)
        return rows


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """``table`` ``[L, states, ...]`` read at ``index`` ``[L, rows]`` -> ``[L, rows, ...]``; differentiable."""
    learner = torch.arange(index.shape[0], device=index.device).unsqueeze(1)
    return table[learner, index]


class StackedNetwork(Protocol):
    """Networks of one shape whose parameters are stacked: what :class:`StackedLearners` needs of them."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def init(self, count: int, generator: torch.Generator) -> dict[str, Tensor]: ...


N = TypeVar("N", bound=StackedNetwork)


class StackedLearners(Generic[N]):
    """Weights of ``L`` independent learners, each of one or more networks, as one tensor, and Adam over it.

    Learners never mix: gradient norms are each learner's own and Adam works by element. A step costs one reduction
    over ranks and one kernel of the optimiser, whatever the number of learners and layers.

    Args:
        networks: by name; a learner has one of each.
        learning_rate: Adam's.
        max_grad_norm: the gradient of each learner and network is scaled down to this Euclidean norm; ``None``: never.
        device: where weights go until :meth:`begin` or :meth:`load_state_dict` says otherwise.
    """

    def __init__(
        self,
        networks: Mapping[str, N],
        learning_rate: float,
        max_grad_norm: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.networks: dict[str, N] = dict(networks)
        self.learning_rate = learning_rate
        self.max_grad_norm = max_grad_norm
        self._layout = [(net, name, shape) for net, mlp in self.networks.items() for name, shape in mlp.shapes.items()]
        self._sizes = [math.prod(shape) for _, _, shape in self._layout]
        self._shares = [sum(math.prod(shape) for shape in mlp.shapes.values()) for mlp in self.networks.values()]
        self.begin(torch.zeros(0, sum(self._sizes), device=device))

    def begin(self, flat: Tensor) -> None:
        """Take ``flat`` ``[L, parameters]`` float32 as the weights and forget what Adam knew."""
        self.flat = flat.detach().requires_grad_()
        self.optimiser = torch.optim.Adam([self.flat], lr=self.learning_rate, eps=1e-5, fused=True)

    def fresh(self, count: int, generator: torch.Generator) -> Tensor:
        """``[count, parameters]`` initial weights, as the networks draw them."""
        drawn = {net: mlp.init(count, generator) for net, mlp in self.networks.items()}
        return torch.cat([drawn[net][name].reshape(count, -1) for net, name, _ in self._layout], dim=1)

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """``network.parameter`` -> ``[L, ...]``, to one float32 tensor ``[L, parameters]`` on the learners' device.

        Raises:
            ValueError: for a missing name, or shapes that do not fit the networks or one another.
        """
        parts: list[Tensor] = []
        for net, name, shape in self._layout:
            key = f"{net}.{name}"
            if key not in params:
                raise ValueError(f"StackedLearners: params: needs '{key}', got {', '.join(sorted(params))}")
            wanted = (len(parts[0]) if parts else len(params[key]), *shape)
            if tuple(params[key].shape) != wanted:
                raise ValueError(f"StackedLearners: params: '{key}' must be {wanted}, got {tuple(params[key].shape)}")
            parts.append(params[key].detach().to(self.flat.device, torch.float32).reshape(wanted[0], -1))
        return torch.cat(parts, dim=1)

    def views(self, flat: Tensor) -> dict[str, dict[str, Tensor]]:
        """Each network's parameters as views of ``flat`` ``[L, parameters]``; differentiable."""
        views: dict[str, dict[str, Tensor]] = {net: {} for net in self.networks}
        for (net, name, shape), part in zip(self._layout, flat.split(self._sizes, dim=1), strict=True):
            views[net][name] = part.view(-1, *shape)
        return views

    def params(self) -> dict[str, Tensor]:
        """Copies of the weights, ``network.parameter`` -> ``[L, ...]``."""
        views = self.views(self.flat.detach())
        return {f"{net}.{name}": views[net][name].clone() for net, name, _ in self._layout}

    def step(
        self,
        loss: Tensor,
        rows: Tensor,
        metrics: Mapping[str, Tensor] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """One Adam step.

        Gradients and metrics travel as sums with the number of rows they are of, so that ranks with unequally many
        rows equal one rank with all of them. A learner without any row takes a step of gradient 0.

        Args:
            loss: ``[L]``, differentiable, a mean over ``rows``.
            rows: ``[L]``, how many rows of this rank the means are over.
            metrics: ``[L]`` each, means likewise.
            reduce: adds (or averages) a flat tensor over ranks; ``None`` for one rank.

        Returns:
            The metrics over all ranks and ``gradient_norm`` (before clipping), ``[L]``, without gradient.
        """
        (gradient,) = torch.autograd.grad((loss * rows.to(loss.dtype)).sum(), self.flat)
        return self.descend(gradient, rows, metrics or {}, reduce)

    def descend(
        self,
        gradient: Tensor,
        rows: Tensor,
        metrics: Mapping[str, Tensor] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """One Adam step along a gradient that is known.

        Args:
            gradient: ``[L, parameters]`` of the loss's sum over ``rows``.
            rows, metrics, reduce: as in :meth:`step`.

        Returns:
            As :meth:`step`; nothing where ``metrics`` is ``None``.
        """
        shown = metrics or {}
        count = rows.to(gradient.dtype)
        if reduce is None:  # nothing travels: means are what they are
            total = torch.where(count > 0, count, 1.0).unsqueeze(1)
            gradient = gradient / total
            means = [torch.where(count > 0, value.detach(), 0.0) for value in shown.values()]
        else:
            sums = torch.stack([count, *(value.detach() * count for value in shown.values())], dim=1)
            packed = torch.cat([gradient, sums], dim=1)
            packed = reduce(packed.reshape(-1)).view_as(packed)
            width = gradient.shape[1]
            total = packed[:, width : width + 1]
            packed = packed / torch.where(total > 0, total, 1.0)
            gradient, means = packed[:, :width], list(packed[:, width + 1 :].unbind(1))
        norms: Tensor | None = None
        if metrics is not None or self.max_grad_norm is not None:
            parts = gradient.split(self._shares, dim=1)
            norms = torch.stack([part.norm(dim=1) for part in parts], dim=1)
            if self.max_grad_norm is not None:
                scale = (self.max_grad_norm / (norms + 1e-6)).clamp_max(1.0)
                gradient = torch.cat([part * scale[:, i : i + 1] for i, part in enumerate(parts)], dim=1)
        self._adam(gradient)
        if metrics is None or norms is None:
            return {}
        return {**dict(zip(shown, means, strict=True)), "gradient_norm": norms.norm(dim=1)}

    def _adam(self, gradient: Tensor) -> None:
        """One step of the optimiser; from the second on its kernel is called at once, which spares 30 us of Python."""
        state, group = self.optimiser.state.get(self.flat), self.optimiser.param_groups[0]
        if not state or self.flat.device.type != "cpu":
            self.flat.grad = gradient.contiguous()
            self.optimiser.step()
            self.flat.grad = None
            return
        state["step"] += 1
        with torch.no_grad():
            torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage] - the kernel of torch.optim.Adam(fused=True); a test holds both equal
                [self.flat], [gradient.contiguous()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
                amsgrad=False, lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
                weight_decay=0.0, eps=group["eps"], maximize=False, grad_scale=None, found_inf=None,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Copies of weights and Adam's moments; loadable by ``torch.load(weights_only=True)``."""
        moments = {key: value.clone() for key, value in self.optimiser.state.get(self.flat, {}).items()}
        return {"flat": self.flat.detach().clone(), "adam": moments}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Go on exactly where :meth:`state_dict` was taken.

        Raises:
            ValueError: if the weights are not those of networks like these.
        """
        flat = state["flat"]
        if flat.ndim != 2 or flat.shape[1] != sum(self._sizes):
            raise ValueError(f"StackedLearners: flat: must be [learners, {sum(self._sizes)}], got {tuple(flat.shape)}")
        self.begin(flat.to(device, copy=True))
        if state["adam"]:
            # The step counter stays where fused Adam keeps it: beside the weights.
            self.optimiser.state[self.flat] = {k: v.to(device, copy=True) for k, v in state["adam"].items()}
