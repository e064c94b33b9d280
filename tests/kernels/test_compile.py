"""The kernels compile for GPUs that are not at hand, and fit their registers."""

import re
import subprocess

import pytest

from moeadapt.kernels import interpreted

RANK, SLOTS = 128, 2


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Return a function that compiles a kernel: the bytes it spills."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if interpreted():
        pytest.skip("Triton interprets kernels in this process")
    from triton import compile as compile_kernel
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def spilled(kernel, config, types: dict[str, str], constants: dict, capability: int) -> int:
        constants = constants | config.kwargs
        names = kernel.fn.arg_names
        signature = {n: "constexpr" if n in constants else types[n] for n in names}
        aligned = [n for n in names if signature[n].startswith("*") or n == "width"]
        source = ASTSource(
            kernel.fn,
            signature,
            {(names.index(n),): constants[n] for n in names if n in constants},
            {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        binary = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
        (tmp_path / "kernel.ptx").write_text(binary.asm["ptx"])
        target = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        command = [knobs.nvidia.ptxas.path, "-v", f"-arch={target}", "-o", "/dev/null"]
        done = subprocess.run(
            [*command, str(tmp_path / "kernel.ptx")], capture_output=True, text=True, check=True
        )
        (spills,) = re.findall(r"(\d+) bytes spill stores", done.stderr)
        return int(spills)

    return spilled


def mix_types() -> dict[str, str]:
    """Return the type of each argument of the kernels of the FFN mixture, in bfloat16."""
    tensors = "gate up hidden_gate hidden_up b_gate b_up mix weighted a_down d_mix d_gated d_gate"
    tensors = f"{tensors} d_up slot_gate slot_up"
    integers = ["owner_gate", "owner_up", "owner_down", "experts"]
    types = {f"{name}_ptr": "*bf16" for name in tensors.split()}
    types |= {f"{name}_ptr": "*i32" for name in integers}
    return types | {
        "weights_ptr": "*fp32",
        "d_weights_ptr": "*fp32",
        "tokens": "i32",
        "width": "i32",
    }


def mix_constants() -> dict:
    """Return the sizes of 8 experts of rank 16, 2 per token."""
    from moeadapt.kernels.mix_activation_triton import BLOCK_F
    from moeadapt.kernels.tuning import rank_block

    sizes = {f"RANK_{x}": RANK for x in "GUD"} | {f"BLOCK_{x}": rank_block(RANK) for x in "GUD"}
    return {"SLOTS": SLOTS, "PRECISION": "tf32", "BLOCK_F": BLOCK_F, **sizes}


def gate_types() -> dict[str, str]:
    """Return the type of each argument of the kernels of the gate."""
    tensors = ["logits", "weights", "probs", "counts", "d_weights", "d_probs", "d_sums", "d_logits"]
    sizes = dict.fromkeys(("tokens", "num_experts", "k"), "i32")
    return {f"{name}_ptr": "*fp32" for name in tensors} | {"mask_ptr": "*i1"} | sizes


@pytest.mark.parametrize("way", ["_forward", "_backward"])
def test_the_kernels_of_the_ffn_mixture_fit_an_h100(compiled, way):
    from moeadapt.kernels import mix_activation_triton as kernels

    kernel = getattr(kernels, way)
    assert compiled(kernel, kernel.configs[0], mix_types(), mix_constants(), 90) == 0


@pytest.mark.parametrize("way", ["_forward", "_backward"])
@pytest.mark.parametrize("experts", [8, 64])
def test_the_kernels_of_the_gate_fit_an_h100(compiled, way, experts):
    from moeadapt.kernels import top_k_gate_triton as kernels

    kernel = getattr(kernels, way)
    constants = {"HAS_MASK": True, "RENORM": True, **kernels._sizes(experts)}
    assert compiled(kernel, kernel.configs[-1], gate_types(), constants, 90) == 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("way", ["_forward", "_backward"])
def test_every_configuration_of_the_ffn_mixture_compiles(compiled, way, capability):
    from moeadapt.kernels import mix_activation_triton as kernels

    kernel = getattr(kernels, way)
    for config in kernel.configs:
        assert compiled(kernel, config, mix_types(), mix_constants(), capability) < 256
