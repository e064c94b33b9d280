"""Published methods as one line each: a name -> fields of `MoeLoraConfig`. Data, not code.

Where a paper leaves a number open, the one of the authors' code is taken. Coefficients are for our
normalisation of each loss (see its file), which is not always the paper's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One published method.

    Attributes:
        line: what it is, in one line.
        source: paper, URL, equation or section.
        fields: the fields of `MoeLoraConfig` that it sets.
        differs: what of the paper is not expressed; empty: nothing.
    """

    line: str
    source: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    differs: str = ""


FFN = ["gate_proj", "up_proj", "down_proj"]
"""The linears of an FFN in Llama, Qwen, Mistral and Gemma; other models need an override."""

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "adamoe": Preset(
            line="Top-k over experts and null experts: a token may use fewer experts, or none.",
            source="Zeng et al. 2024, https://arxiv.org/abs/2406.13233, section 3",
            fields={
                "r": 8,
                "lora_alpha": 16,
                "num_experts": 4,
                "router": {"name": "top_k", "k": 3, "null_experts": 4},
                "balance": {"switch": 0.001},
                "target_modules": "all-linear",
            },
            differs="The numbers of null experts and of slots are ours.",
        ),
        "adamole": Preset(
            line="Softmax above a threshold that each token predicts.",
            source="Liu and Luo 2024, https://arxiv.org/abs/2405.00361, eq. 5-7",
            fields={
                "r": 4,
                "lora_alpha": 16,
                "num_experts": 8,
                "router": {"name": "threshold", "learned": True},
                "balance": {"switch": 0.001},
                "target_modules": ["q_proj", "v_proj"],
                "lora_dropout": 0.05,
            },
            differs=(
                "A token that passes no threshold uses its best expert instead of none; the "
                "balance loss is on probabilities, where the authors' code subtracts the threshold."
            ),
        ),
        "deepseek": Preset(
            line="Many small experts, shared ones, sigmoid scores, balance by a selection bias.",
            source=(
                "DeepSeekMoE, Dai et al. 2024, https://arxiv.org/abs/2401.06066, eq. 9-11; "
                "DeepSeek-V3, https://arxiv.org/abs/2412.19437, eq. 12-16"
            ),
            fields={
                "r": 16,
                "lora_alpha": 32,
                "num_experts": 4,
                "granularity": 4,
                "n_shared": 1,
                "router": {"name": "sigmoid", "k": 1},
                "balance": {"loss_free": {"rate": 0.001}},
                "target_modules": "all-linear",
            },
            differs="Without the sequence-wise balance loss (1e-4) and the limit on nodes.",
        ),
        "dynmoe": Preset(
            line="Each expert has a learned threshold; training switches experts on and off.",
            source="Guo et al. 2024, https://arxiv.org/abs/2405.14297, section 3",
            fields={
                "r": 8,
                "lora_alpha": 16,
                "num_experts": 8,
                "router": {"name": "dynamic", "start": 4, "every": 100},
                "balance": {"simbal": 0.01},
                "target_modules": "all-linear",
            },
            differs=(
                "The diversity loss sums absolute entries, over all experts; without the "
                "simplicity loss, the mean norm of the expert embeddings."
            ),
        ),
        "flylora": Preset(
            line="A frozen sparse random A chooses the ranks of a token; only B is trained.",
            source="Zou et al. 2025, https://arxiv.org/abs/2510.08396, section 3",
            fields={
                "r": 8,
                "lora_alpha": 64,
                "num_experts": 4,
                "experts": {"name": "random_a", "k": 8},
                "router": "uniform",
                "balance": None,
                "target_modules": "all-linear",
            },
            differs="Without the load-balancing bias on A x.",
        ),
        "goat": Preset(
            line="Expert e starts from the e-th segment of the SVD of the base weight.",
            source="Fan et al. 2025, https://arxiv.org/abs/2502.16894, section 3",
            fields={
                "r": 4,
                "num_experts": 8,
                "router": {"name": "top_k", "k": 2},
                "balance": {"switch": 0.001},
                "init_lora_weights": "svd_segments",
                "target_modules": "all-linear",
            },
            differs="The residual is a frozen branch; the base weight stays as it is.",
        ),
        "hydralora": Preset(
            line="One shared A, a B per expert, all mixed by a softmax.",
            source="Tian et al. 2024, https://arxiv.org/abs/2404.19245, eq. 6",
            fields={
                "r": 4,
                "lora_alpha": 32,
                "num_experts": 3,
                "router": "soft",
                "experts": "shared_a",
                "balance": None,
                "target_modules": FFN,
                "lora_dropout": 0.05,
            },
        ),
        "ldmole": Preset(
            line="Sparse projection onto the simplex, whose sparsity each token predicts.",
            source="Zhuang et al. 2025, https://arxiv.org/abs/2509.25684, proposition 1",
            fields={
                "r": 8,
                "lora_alpha": 16,
                "num_experts": 8,
                "router": "sparsegen",
                "balance": {"switch": 1.0},
                "target_modules": "all-linear",
                "lora_dropout": 0.1,
            },
            differs=(
                "One linear map per router predicts the sparsity, not an MLP shared by the model; "
                "the balance loss is on softmax probabilities; without the sparsity loss."
            ),
        ),
        "loramoe": Preset(
            line="LoRA experts in the FFN, all mixed by a softmax.",
            source="Dou et al. 2023, https://arxiv.org/abs/2312.09979, section 3",
            fields={
                "r": 4,
                "lora_alpha": 32,
                "num_experts": 6,
                "router": "soft",
                "balance": None,
                "target_modules": FFN,
                "lora_dropout": 0.05,
            },
            differs="Later: the localized balancing constraint, which needs each sample's type.",
        ),
        "mixlora": Preset(
            line="Experts are whole FFNs with LoRA on their linears; attention gets a plain LoRA.",
            source="Li et al. 2024, https://arxiv.org/abs/2404.15159, section 3",
            fields={
                "r": 16,
                "lora_alpha": 32,
                "num_experts": 8,
                "placement": "ffn",
                "router": {"name": "top_k", "k": 2},
                "balance": {"switch": 0.01},
                "target_modules": "all-linear",
                "lora_dropout": 0.05,
            },
            differs="The balance loss counts both slots of a token, not only its first one.",
        ),
        "mola": Preset(
            line="More experts in higher layers: 2, 4, 6 and 8 over the depth.",
            source="Gao et al. 2024, https://arxiv.org/abs/2402.08562, section 3",
            fields={
                "r": 8,
                "lora_alpha": 16,
                "num_experts": 8,
                "experts_pattern": [2, 4, 6, 8],
                "router": {"name": "top_k", "k": 2},
                "balance": {"switch": 0.001},
                "target_modules": "all-linear",
                "lora_dropout": 0.05,
            },
            differs="A depth that four does not divide needs another experts_pattern.",
        ),
        "molora": Preset(
            line="LoRA experts on every linear, all mixed by a softmax.",
            source="Zadouri et al. 2023, https://arxiv.org/abs/2309.05444, section 2.2",
            fields={
                "r": 4,
                "lora_alpha": 16,
                "num_experts": 10,
                "router": "soft",
                "balance": None,
                "target_modules": "all-linear",
            },
        ),
        "mov": Preset(
            line="Experts are vectors that scale activations, mixed by a softmax.",
            source="Zadouri et al. 2023, https://arxiv.org/abs/2309.05444, section 2.2",
            fields={
                "num_experts": 10,
                "router": "soft",
                "experts": "ia3",
                "balance": None,
                "target_modules": ["k_proj", "v_proj", "up_proj"],
            },
            differs="The router sees the input of a linear, in the authors' code the output.",
        ),
        "omoe": Preset(
            line="Gram-Schmidt makes the outputs of a token's experts orthogonal.",
            source="Feng et al. 2025, https://arxiv.org/abs/2501.10062, section 3",
            fields={
                "r": 16,
                "lora_alpha": 32,
                "num_experts": 2,
                "router": "soft",
                "experts": {"name": "lora", "orthogonalize": True},
                "balance": None,
                "target_modules": "all-linear",
            },
            differs="Orthogonal outputs keep their length; the number of experts is ours.",
        ),
        "remoe": Preset(
            line="ReLU gates; an adaptive L1 loss holds the share of active experts.",
            source="Wang et al. 2024, https://arxiv.org/abs/2412.14711, eq. 5-11",
            fields={
                "r": 8,
                "lora_alpha": 16,
                "num_experts": 8,
                "router": "relu",
                "balance": {"l1_sparsity": {"coef": 1e-8, "target": 0.125, "balanced": True}},
                "target_modules": "all-linear",
            },
        ),
        "smora": Preset(
            line="Every rank is an expert; balance by a selection bias.",
            source="Zhao et al. 2025, https://arxiv.org/abs/2501.15103, eq. 7-9",
            fields={
                "r": 8,
                "lora_alpha": 16,
                "num_experts": 8,
                "router": {"name": "rank_wise", "k": 8},
                "experts": "rank1",
                "balance": {"loss_free": {"rate": 0.001}},
                "target_modules": "all-linear",
            },
        ),
        "soft": Preset(
            line="Every expert for every token, mixed by a softmax; no balance loss.",
            source='Jacobs et al. 1991, "Adaptive Mixtures of Local Experts", eq. 1.3',
            fields={
                "r": 8,
                "lora_alpha": 16,
                "num_experts": 4,
                "router": "soft",
                "balance": None,
                "target_modules": "all-linear",
            },
        ),
        "switch": Preset(
            line="Each token uses the one FFN expert that is most probable.",
            source="Fedus et al. 2021, https://arxiv.org/abs/2101.03961, eq. 1-6",
            fields={
                "r": 16,
                "lora_alpha": 32,
                "num_experts": 8,
                "placement": "ffn",
                "router": {"name": "switch", "jitter": 0.01},
                "balance": {"switch": 0.01},
                "target_modules": "all-linear",
            },
            differs=(
                "Experts are LoRA over the frozen FFN, which takes what the probability leaves of "
                "1; no capacity, so no token is dropped."
            ),
        ),
    }
)
