"""What only a GPU has: a decoding step in a CUDA graph, and a compiled training step.

Nobody has run this yet.

Letters: T tokens, D width of the model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from benchmarks.speed.arms import Shape, make_arms, random_llama
from benchmarks.speed.case import Sizes
from benchmarks.speed.measure import Measured, in_turns
from benchmarks.speed.model import PROMPT, step_of

ARMS = ["base", "lora_Nr", "ours_layer", "ours_block"]
WARM = 3


def graphed_decode(model: Any, prompt: Tensor) -> Callable[[], None]:
    """Return what replays one decoding step after `prompt`, captured as a CUDA graph."""
    cache = StaticCache(config=model.config, max_cache_len=2 * prompt.shape[1])
    token = prompt[:, -1:].clone()

    def step() -> None:
        model(input_ids=token, past_key_values=cache, use_cache=True)

    model.eval()
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay


def measure(shape: Shape, sizes: Sizes, rounds: int) -> list[Measured]:
    """Time a compiled step (`mode="reduce-overhead"`) and a graphed decoding step."""
    load = partial(random_llama, shape, sizes)
    ids = torch.randint(1, 512, (1, sizes.tokens), device=sizes.device)
    models = {name: model.train() for name, model in make_arms(load, sizes, ARMS).items()}
    common: dict[str, Any] = {"benchmark": "llama", "sizes": sizes.named()}
    common |= {"baseline": "lora_Nr", "ours": "ours_block"}
    graphs = {name: graphed_decode(m, ids[:, :PROMPT]) for name, m in models.items()}
    decoded = in_turns(graphs, rounds, sizes.device)
    steps = {}
    for name, model in models.items():
        compiled = torch.compile(model.train(), mode="reduce-overhead")
        steps[name] = step_of(compiled, ids)
        for _ in range(WARM):
            steps[name]()
    return [
        Measured(work="decode, CUDA graph", seconds=decoded, **common),
        Measured(work="step, compiled", seconds=in_turns(steps, rounds, sizes.device), **common),
    ]
