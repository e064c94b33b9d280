"""Step time and activation memory of each placement, as ratios to plain PEFT LoRA.

    OMP_NUM_THREADS=1 python benchmarks/placements.py --csv benchmarks/results/placements.csv

All arms sit in one process on copies of one small Llama and take turns, so that a noisy machine
hurts them alike; ratios are medians over rounds, with quartiles. Activation memory is what autograd
saves for backward (each storage once, parameters left out). The mixtures are first checked against
their definition, and nothing is printed if that fails.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from common import append_csv, where
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import moeadapt
from moeadapt.dispatch import dispatch, dispatch_reference
from moeadapt.experts import EXPERTS, BankSize
from moeadapt.routing import TokenContext


def parse_args() -> argparse.Namespace:
    """Read the sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def make_models(args: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """Return every arm on its own copy of the base."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=args.hidden,
        intermediate_size=int(args.hidden * 2.75),
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        pad_token_id=0,
    )
    targets = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}

    def lora(rank: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=2 * rank, **targets)

    def mixture(**placement: str) -> moeadapt.MoeLoraConfig:
        return moeadapt.MoeLoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            num_experts=args.experts,
            router={"name": "top_k", "k": args.k},
            **placement,
            **targets,
        )

    total = args.experts * args.rank
    adapters = {
        f"lora_r{args.rank}": lora(args.rank),
        f"lora_r{total}": lora(total),
        "linear_layer": mixture(placement="linear", router_scope="layer"),
        "linear_block": mixture(placement="linear", router_scope="block"),
        "ffn": mixture(placement="ffn"),
    }
    models = {}
    for name, adapter in adapters.items():
        torch.manual_seed(0)
        base = LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype))
        models[name] = get_peft_model(base, adapter).train()
    return models


def check_against_definition(args: argparse.Namespace) -> None:
    """Raise if the fast form of this run's sizes differs from its definition."""
    torch.manual_seed(0)
    size = BankSize(in_features=32, out_features=24, num_experts=args.experts, rank=args.rank)
    bank = EXPERTS.parse("lora").build(size, init="random")
    for name in bank.factor_names:
        bank.factor(name).double()
    x = torch.randn(13, 32, dtype=torch.float64)
    router = moeadapt.ROUTERS.parse({"name": "top_k", "k": args.k}).build(32, args.experts)
    weights = router.double()(x, TokenContext()).weights
    base = torch.randn(13, 24, dtype=torch.float64)
    fast, slow = dispatch(x, weights, bank, base), dispatch_reference(x, weights, bank, base)
    torch.testing.assert_close(fast, slow)


def step(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Seconds of one forward and backward; CPU time on a CPU."""
    cuda = ids.is_cuda
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    model(input_ids=ids, labels=ids).loss.backward()
    if cuda:
        torch.cuda.synchronize()
    seconds = clock() - start
    model.zero_grad()
    return seconds


def saved_bytes(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Bytes that autograd keeps for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    total = sum(seen.values())
    del loss
    return total


def main() -> None:
    """Measure, print, and append to the CSV."""
    args = parse_args()
    check_against_definition(args)
    models = make_models(args)
    ids = torch.randint(1, 1024, (1, args.tokens), device=args.device)
    for model in models.values():
        step(model, ids)
    rounds = [{name: step(m, ids) for name, m in models.items()} for _ in range(args.rounds)]
    memory = {name: saved_bytes(m, ids) for name, m in models.items()}
    small, large = list(models)[:2]
    rows = []
    for name in models:
        to_small = [turn[name] / turn[small] for turn in rounds]
        to_large = [turn[name] / turn[large] for turn in rounds]
        low, middle, high = statistics.quantiles(to_large, n=4)
        rows.append(
            {
                "arm": name,
                f"step/{small}": round(statistics.median(to_small), 3),
                f"step/{large}": round(middle, 3),
                "quartiles": f"{low:.2f}-{high:.2f}",
                f"saved/{small}": round(memory[name] / memory[small], 3),
                f"saved/{large}": round(memory[name] / memory[large], 3),
            }
        )
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    if args.csv:
        write_csv(args, rows)


def write_csv(args: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    """Append rows with sizes, versions, commit and device."""
    common = {
        "hidden": args.hidden,
        "layers": args.layers,
        "tokens": args.tokens,
        "experts": args.experts,
        "rank": args.rank,
        "k": args.k,
        "dtype": args.dtype,
        **where(args.device),
    }
    append_csv(args.csv, [{**row, **common} for row in rows])


if __name__ == "__main__":
    main()
