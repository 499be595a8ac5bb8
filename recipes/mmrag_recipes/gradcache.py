"""Large contrastive batches in the memory of a small one (GradCache, arXiv 2101.06983, section 3).

Vectors of the whole batch are computed without a graph, the loss gives the gradient of each
vector, and each chunk is then run again with a graph to carry its vectors' gradients to the
weights. The random state of each chunk is kept and set again, so that dropout falls the same
way both times and the result is that of the whole batch at once. The last chunk keeps its graph
from the first time, so it runs once.

A module that does not train, such as a frozen vision tower, gives the same both times: it runs
once, and the second pass takes what it gave.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from mmrag.modeling.batching import iter_batches


class HasForward(Protocol):
    """A module, or what stands for one."""

    forward: Callable[..., Any]


Encode = Callable[[Sequence[Any]], Tensor]
Loss = Callable[[Tensor], Tensor]


def step(
    encode: Encode,
    inputs: Sequence[Any],
    loss: Loss,
    chunk: int | None = None,
    frozen: Sequence[HasForward] = (),
    costs: Sequence[int] | None = None,
) -> Tensor:
    """Add the gradient of ``loss(encode(inputs))`` to the weights.

    Args:
        encode: turns k inputs into (k, d) vectors, each from its own input alone.
        inputs: all inputs of the step.
        loss: of all (n, d) vectors at once.
        chunk: inputs run at a time with a graph; None or 0 runs all at once, without a cache.
        frozen: modules without a weight that trains, whose inputs depend on none either. Their
            outputs are kept from the first pass to the second, so they take memory for all
            inputs of the step.
        costs: tokens of each input. A chunk then has as many tokens, padded, as ``chunk`` of the
            longest have, so that short questions run more at a time.

    Returns:
        The loss, detached.
    """
    if not chunk or chunk >= len(inputs):
        value = loss(encode(inputs))
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()
    places = _places_of_chunks(len(inputs), chunk, costs)
    chunks = [[inputs[place] for place in some] for some in places]
    order = torch.tensor([place for some in places for place in some])
    states, parts = [], []
    with ExitStack() as stack:
        kept = [stack.enter_context(_run_once(module)) for module in frozen]
        with torch.no_grad():
            for part in chunks[:-1]:
                states.append(_random_state())
                parts.append(encode(part))
        last = encode(chunks[-1])
        # A leaf of its own: the backward of the loss ends here.
        vectors = torch.cat([*parts, last]).detach()[order.argsort()].requires_grad_()
        value = loss(vectors)
        value.backward()  # type: ignore[no-untyped-call]
        assert vectors.grad is not None
        *gradients, own = torch.split(vectors.grad[order], [len(part) for part in chunks])
        # Chain rule: a chunk's vectors carry the loss's gradient to the weights. The last goes
        # first, so that there is never the graph of two.
        torch.autograd.backward(last, own.to(last.dtype))
        for outputs in kept:
            outputs.replaying = True
        for part, state, gradient in zip(chunks[:-1], states, gradients, strict=True):
            with _replay(state):
                again = encode(part)
            torch.autograd.backward(again, gradient.to(again.dtype))
    return value.detach()


def _places_of_chunks(n: int, chunk: int, costs: Sequence[int] | None) -> list[list[int]]:
    """Places of the inputs of each chunk; the longest last, which is the chunk that runs once."""
    if costs is None:
        return [list(range(start, min(start + chunk, n))) for start in range(0, n, chunk)]
    most = chunk * max(costs)
    return list(iter_batches(costs, lambda: most))[::-1]


class _Outputs:
    """Outputs of a module in the order of its calls."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.outputs: deque[Any] = deque()
        self.replaying = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaying:
            return self.outputs.popleft()
        output = self.forward(*args, **kwargs)
        self.outputs.append(output)
        return output


@contextmanager
def _run_once(module: HasForward) -> Iterator[_Outputs]:
    """Let a module run in the first pass and hand out its outputs in the second."""
    own = vars(module).get("forward")
    outputs = _Outputs(module.forward)
    module.forward = outputs
    try:
        yield outputs
    finally:
        if own is None:
            # The instance had none of its own; setting the class's would keep it from being
            # pickled.
            del module.forward
        else:
            module.forward = own


def _random_state() -> tuple[Tensor, list[Tensor]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), cuda


@contextmanager
def _replay(state: tuple[Tensor, list[Tensor]]) -> Iterator[None]:
    """Run with an earlier random state, and then go on with the present one."""
    now = _random_state()
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(now)


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
