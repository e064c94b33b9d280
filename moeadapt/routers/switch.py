"""Switch routing: each token uses its one most probable expert, weighted by its probability.

Letters: T tokens, D width, E experts.

Source: Fedus et al. 2021, https://arxiv.org/abs/2101.03961, section 2.1. It is `top_k` with `k=1`,
`normalize="none"`, under the name it was published by.
"""

from typing import ClassVar, Literal

from moeadapt.routers.top_k import TopKConfig


class SwitchConfig(TopKConfig):
    """`top_k` whose `k` is 1 and whose weight is the probability.

    Attributes:
        k: always 1.
        normalize: always `none`: a renormalised weight would be 1 and never train the router.
    """

    k_can_change: ClassVar = False

    k: Literal[1] = 1
    normalize: Literal["none"] | None = None
