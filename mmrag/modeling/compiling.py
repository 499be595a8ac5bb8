"""Fewer passes over memory and fewer launches: compiled blocks, and short runs that are replayed.

On a fast card a model of two billion weights spends two fifths of a page in elementwise kernels,
which the compiler fuses, and nearly all of a query in launching kernels, which a CUDA graph
launches at once.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from mmrag.errors import ConfigError
from mmrag.modeling.batching import Sized, padded_tokens

logger = logging.getLogger(__name__)

LARGE = 4096
"""Tokens of a padded batch from which on compiled blocks run; smaller ones run as they are."""
HOT = 500_000
"""Tokens in large batches after which compiling pays: it takes about as long as they do."""
LENGTHS = (32, 64, 128, 256, 384, 512, 768, 1024)
"""Lengths of runs that are recorded, in tokens; what is shorter is padded to the next."""
_BACKEND = "inductor"

S = TypeVar("S", bound=Sized)
R = TypeVar("R")


class HotBlocks:
    """Compiles the repeated blocks of a model once it has enough to do, and runs them.

    All blocks of a kind share one compiled graph, with dynamic shapes. Only batches of several
    items and ``LARGE`` tokens use it; each other shape would have to be compiled again.

    Args:
        compile: True compiles at the first large batch, None on CUDA after ``HOT`` tokens, False
            never. None is False where there is no compiler.

    Raises:
        ConfigError: For True without a compiler.
    """

    def __init__(self, model: nn.Module, compile: bool | None) -> None:
        self._blocks = list(repeated_blocks(model))
        device = next(model.parameters()).device
        missing = missing_compiler(device)
        if compile and missing:
            raise ConfigError(f"compile=True needs {missing}.")
        usual = device.type == "cuda" and missing is None
        self._active = usual if compile is None else compile
        self._cold = HOT if compile is None else 0  # tokens until it compiles
        self._compiled = False

    def run(self, forward: Callable[[Sequence[S]], R], batch: Sequence[S]) -> R:
        """Result of ``forward`` on a batch, by compiled blocks where they help."""
        if not self._active:
            return forward(batch)
        tokens = padded_tokens(batch)
        if len(batch) == 1 or tokens < LARGE:
            if not self._compiled:
                return forward(batch)
            with torch.compiler.set_stance("force_eager"):
                return forward(batch)
        self._cold -= tokens
        if self._cold > 0:
            return forward(batch)
        if not self._compiled:
            for block in self._blocks:
                block.compile(dynamic=True, backend=_BACKEND)
            self._compiled = True
        from torch._dynamo.exc import TorchDynamoException  # a second to import

        try:
            return forward(batch)
        except TorchDynamoException as error:
            first = str(error).strip().partition("\n")[0]
            logger.warning(
                "The model cannot be compiled here (%s): it runs as it is, slower. compile=False "
                "avoids the attempt.",
                first,
            )
        self.release()
        return forward(batch)

    def release(self) -> None:
        """Run the blocks as they are from now on."""
        for block in self._blocks:
            block._compiled_call_impl = None  # undoes block.compile
        self._active = False


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of the outermost lists of blocks of one kind: layers of towers and decoders."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len(set(map(type, child))) == 1:
            yield from child
        else:
            yield from repeated_blocks(child)


def missing_compiler(device: torch.device) -> str | None:
    """What compiling for a device lacks here; None for nothing."""
    if device.type == "cuda" and not has_triton():
        return "Triton, which comes with torch for CUDA on Linux"
    compilers = (os.environ.get("CXX"), os.environ.get("CC"), "cc", "gcc", "g++", "clang")
    if not any(shutil.which(name) for name in compilers if name):
        return "a C++ compiler, such as g++"
    return None


class ShortRuns:
    """A decoder's runs over one short sequence, recorded once a length and then replayed.

    For causal decoders without cache, on CUDA, in inference mode. One run at a time.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder = decoder
        self._recorded: dict[int, tuple[Tensor, Tensor, Callable[[], object]]] = {}
        self._active = True

    def __reduce__(self) -> tuple[type[ShortRuns], tuple[nn.Module]]:
        return ShortRuns, (self._decoder,)  # a graph belongs to its process

    def takes(self, embeds: Tensor) -> bool:
        """Whether these embeddings, (batch, length, dim), can be run here."""
        one = len(embeds) == 1 and embeds.shape[1] <= LENGTHS[-1]
        return one and self._active and torch.is_inference_mode_enabled()

    def __call__(self, embeds: Tensor) -> Tensor:
        """States of the last layer after the norm for embeddings, both (1, length, dim)."""
        length = embeds.shape[1]
        padded = next(each for each in LENGTHS if each >= length)
        if padded not in self._recorded:
            try:
                self._recorded[padded] = record(self._decoder, embeds, padded)
            except RuntimeError as error:
                logger.warning("Short texts cannot be recorded as CUDA graphs here (%s).", error)
                self._active = False
                return run_decoder(self._decoder, embeds)
        inputs, states, replay = self._recorded[padded]
        # What stands behind a token is not seen by it, whatever an earlier run has left there.
        inputs[:, :length].copy_(embeds)
        replay()
        return states[:, :length].clone()


def record(
    decoder: nn.Module, like: Tensor, length: int
) -> tuple[Tensor, Tensor, Callable[[], object]]:
    """Record a run over ``length`` embeddings as a CUDA graph.

    Returns:
        Where its inputs go, where its states come out, both (1, length, dim), and its replay.
    """
    inputs = like.new_zeros(1, length, like.shape[2])
    # On a stream of its own, as torch.cuda.graph asks: libraries set themselves up in first runs.
    # Kernels keep the priority of the stream that recorded them, and a query goes before pages.
    side = torch.cuda.Stream(like.device, priority=-1)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(like.device))
    with torch.cuda.stream(side):
        for _ in range(2):
            run_decoder(decoder, inputs)
    torch.cuda.current_stream(like.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # cuBLAS keeps one workspace for a stream, which all that is recorded there would use: graphs
    # that run at once would write over each other's sums. Cleared, each gets its own.
    torch._C._cuda_clearCublasWorkspaces()
    # Threads that prepare other inputs may allocate meanwhile.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        states = run_decoder(decoder, inputs)
    torch._C._cuda_clearCublasWorkspaces()
    return inputs, states, graph.replay


def run_decoder(decoder: Any, embeds: Tensor) -> Tensor:
    """States of the last layer after the norm, (batch, length, dim), as ``embeds``."""
    output = decoder(inputs_embeds=embeds, use_cache=False)
    return torch.as_tensor(output.last_hidden_state)
