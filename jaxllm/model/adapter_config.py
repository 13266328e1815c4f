"""The config group `config.adapter.*`: a few weights that are trained beside a model that is frozen."""

from dataclasses import dataclass

PROMPTS = ("prompt", "p_tuning", "prefix")
KINDS = ("none", "lora", *PROMPTS)
INITS = ("kaiming", "gaussian", "pissa")
BASE_WEIGHTS = ("compute", "nf4")
ENCODERS = ("mlp", "lstm")
PROMPT_INITS = ("random", "vocabulary", "text")


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
    num_virtual_tokens: int = 16  # prompt, p_tuning and prefix: learned tokens before every text
    prompt_init: str = "random"  # prompt: random | vocabulary: embeddings of random tokens | text: of prompt_text's
    prompt_text: str = ""  # repeated, or cut, to num_virtual_tokens tokens
    encoder: str = "mlp"  # p_tuning: what makes the virtual tokens of embeddings: mlp | lstm, which reads both ways
    encoder_dim: int = 0  # p_tuning, and prefix with prefix_projection: hidden units; 0: embed_dim
    encoder_layers: int = 2  # p_tuning: of the lstm
    prefix_projection: bool = False  # prefix: keys and values are what an mlp makes of embeddings
    init_from: str = ""  # a WORKDIR whose adapter a fresh run goes on with; "": a new one

    @property
    def scale(self) -> float:
        """What a LoRA's product is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    @property
    def places(self) -> int:
        """How many tokens at the start of every document are only places for virtual ones (model/prompts.py)."""
        return self.num_virtual_tokens if self.kind in PROMPTS else 0


NO_ADAPTER = AdapterConfig()
