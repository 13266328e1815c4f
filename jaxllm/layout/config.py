"""The config groups of a layout: `config.mesh.*`, `config.layout.*`, and the cluster it is for, `config.cluster.*`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis, outermost first. One of them may be -1: "the rest"."""

    pipeline: int = 1  # layers into stages; over the slow network
    replica: int = 1  # the batch; state copied (data parallelism across islands, HSDP)
    data: int = -1  # the batch; state too from ZeRO 1 on
    expert: int = 1  # experts, and the batch outside them
    context: int = 1  # the sequence (ring attention)
    model: int = 1  # heads, mlp, vocab (tensor parallelism); innermost, over NVLink


@dataclass(frozen=True)
class ClusterConfig:
    """What a run is meant for: `jaxllm plan` reads it, nothing that trains does. 0 and "": as the table has it."""

    name: str = "h100x8"  # a cluster of plan/clusters.toml, or a file such as that one: FILE.toml
    gpus: int = 0  # 0: as few as config.mesh has, -1 being 1
    gpu: str = ""  # another card in the nodes of `name`
    gpus_per_node: int = 0
    network_bandwidth: float = 0.0  # GB/s of a GPU to other nodes, in one direction


@dataclass(frozen=True)
class LayoutConfig:
    """How the work is laid on the mesh."""

    rules: str = "megatron"  # a rule set of layout/rules.py, or FILE.py:NAME
    rule_overrides: str = ""  # rows put over it: "vocab=none,batch=replica+data"
    sequence_parallel: bool = False  # between blocks the sequence is split over `model` too
    zero_stage: int = 1  # 0 to 3: when the weights are gathered, see layout/zero.py
    num_microbatches: int = 1  # gradient accumulation: microbatches a step
    schedule: str = "1f1b"  # of a pipeline: gpipe | 1f1b | 1f1b_aligned | interleaved | zero_bubble | FILE.py:NAME
    virtual_stages: int = 1  # interleaved: groups of layers a pipeline device holds
    stage_layers: str = ""  # layers a stage: "" as even as can be | light_ends | a list such as "5,6,6,5"
    context_attention: str = "ring"  # over the mesh axis `context`: ring | all_gather
    remat: str = "none"  # what the backward pass recomputes: none | selective | full
    scan_layers: bool = True  # one compiled layer looped; False unrolls (about 1.3 times as fast on CPU)
    allow_replication: bool = False  # warn of tensors that are whole by accident (layout/compile_check.py), go on
    model_across_nodes: bool = False  # let the mesh axis `model` leave a node, whose network is much slower
    attention: str = "auto"  # auto | xla | cudnn: the attention backend; see model/attention.py
