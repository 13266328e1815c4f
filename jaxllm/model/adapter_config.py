"""The config group `config.adapter.*`: a few weights that are trained beside a model that is frozen."""

from dataclasses import dataclass

PROMPTS = ("prompt", "p_tuning", "prefix")
KINDS = ("none", "lora", *PROMPTS)
INITS = ("kaiming", "gaussian", "pissa")
BASE_WEIGHTS = ("compute", "nf4")


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained in place of the model's own weights; those are `config.train.init_from`'s."""

    kind: str = "none"  # none: the whole model is trained | lora | prompt | p_tuning | prefix (P-tuning v2)
    base_weights: str = "compute"  # how the frozen weights are held: in config.precision.compute | nf4 (QLoRA)
    rank: int = 16  # lora, like all fields down to init
    alpha: float = 32.0  # what is added is times alpha / rank
    rank_stabilized: bool = False  # times alpha / sqrt(rank) (rsLoRA)
    dropout: float = 0.0  # on what enters an adapter
    targets: str = "all-linear"  # linear layers by the end of their path, or by a regular expression: "query,mlp.up"
    dora: bool = False  # the length of each column of a matrix is trained apart from its direction (DoRA)
    init: str = "kaiming"  # kaiming | gaussian | pissa: from the largest singular vectors of the frozen matrix

    @property
    def scale(self) -> float:
        """What a LoRA's product is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


NO_ADAPTER = AdapterConfig()
