"""Mistakes a person makes: each gets one or two lines that name the value and the way out, exit code 2, no traceback.

All run in process through `main(argv)`, before anything is compiled; a few run once more as real commands.
"""

import subprocess
import sys

import pytest

from tests.mistakes import mistake

FILE = """
from jaxllm.train.config import base_config

def get_config():
    config = base_config()
    config.model.update(num_layers=2, embed_dim=32, num_heads=4, max_length=16)
    config.data.update(path="no-such-text.txt", batch_size=16)
    return config
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(FILE)
    return path


FLAGS = {
    "unknown verb": (["generat"], "'generat' is not a verb. Did you mean 'generate'?"),
    "flag before the verb": (["--workdir=x", "train"], "the verb comes first"),
    "unknown flag": (["train", "--wrkdir=x"], "--wrkdir is not a flag of jaxllm train. Did you mean '--workdir'?"),
    "misspelt --config": (["train", "--confg.mesh.model=2"], "written --config.GROUP.FIELD=VALUE"),
    "stray word": (["train", "configs/sanguo.py"], "'configs/sanguo.py' is not expected here"),
    "flag without its value": (["train", "--workdir"], "argument --workdir: expected one argument"),
    "no config": (["train", "--workdir=x"], "say what to train: --config FILE.py"),
}


@pytest.mark.parametrize(("argv", "says"), FLAGS.values(), ids=FLAGS.keys())
def test_flags(argv, says, capsys):
    assert says in mistake(argv, capsys)


def test_no_workdir(experiment, capsys):
    assert "--workdir DIR" in mistake(["train", f"--config={experiment}"], capsys)


def test_workdir_is_a_file(experiment, capsys):
    said = mistake(["train", f"--config={experiment}", f"--workdir={experiment}"], capsys)
    assert f"--workdir {experiment} is a file" in said
    said = mistake(["train", f"--config={experiment}", f"--workdir={experiment}/run"], capsys)
    assert f"{experiment}, on the way to it, is a file" in said


def test_workdir_is_not_writable(experiment, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != experiment.parent)  # the superuser may write anywhere
    said = mistake(["train", f"--config={experiment}", f"--workdir={experiment.parent}/runs/1"], capsys)
    assert f"--workdir {experiment.parent}/runs/1: {experiment.parent} is not writable" in said


def test_missing_config_file(experiment, capsys):
    said = mistake(["train", f"--config={experiment.with_name('experimnt.py')}", "--workdir=x"], capsys)
    assert "no such file. Did you mean 'experiment.py'?" in said


def test_config_file_with_an_error(experiment, capsys):
    experiment.write_text(FILE.replace("num_layers", "layers"))
    said = mistake(["train", f"--config={experiment}", "--workdir=x"], capsys)
    assert f"{experiment}:6: 'layers' is not a field. Did you mean 'num_layers'?" in said


FIELDS = {
    "unknown field": ("mesh.modle=2", "config.mesh.modle is not a field. Did you mean 'config.mesh.model'?"),
    "unknown group": ("optimiser.name=lion", "Did you mean 'config.optimizer.name'?"),
    "field of another group": ("model.batch_size=2", "Did you mean 'config.data.batch_size'?"),
    "wrong type": ("mesh.model=two", "--config.mesh.model=two must be a whole number"),
    "not a boolean": ("layout.scan_layers=perhaps", "must be true or false"),
    "unknown preset": ("model=gtp2", "--config.model=gtp2 is no preset. Did you mean 'gpt2'?"),
    "unknown train step": ("train_step=pretrian", "config.train_step='pretrian' is unknown. Did you mean 'pretrain'?"),
    "a step that the model is not for": (
        "train_step=mlm",
        "config.train_step=mlm does not go with config.model.causal=True: a token sees only what comes before it. "
        "Use --config.train_step=pretrain or sft or lora or prompt or reward or dpo or ppo or grpo, or "
        "--config.model.causal=False.",
    ),
    "all tokens masked": ("data.mask_fraction=1.0", "config.data.mask_fraction=1.0 must be between 0 and 1."),
    "unknown optimizer": ("optimizer.name=adam", "config.optimizer.name='adam' is unknown. Did you mean 'adamw'?"),
    "unknown schedule": ("optimizer.schedule=cosin", "Did you mean 'cosine'?"),
    "unknown activation": ("model.activation=gleu", "Did you mean 'gelu'?"),
    "unknown norm": ("model.norm=rms", "Did you mean 'rmsnorm'?"),
    "unknown positions": ("model.positions=rotary", "Choose from: alibi, learned, none, rope."),
    "unknown remat": ("layout.remat=everything", "Choose from: full, none, selective."),
    "unknown precision": ("precision.compute=bf16", "Did you mean 'bfloat16'?"),
    "unknown attention over context": ("layout.context_attention=gather", "Did you mean 'all_gather'?"),
    "unknown attention": ("layout.attention=cudn", "Did you mean 'cudnn'?"),
    "zero stage": ("layout.zero_stage=4", "config.layout.zero_stage=4 must be 0, 1, 2 or 3."),
    "seed": ("seed=4294967296", "config.seed=4294967296 must be from 0 up to 4294967295."),
    "negative seed": ("seed=-1", "config.seed=-1 must be from 0"),
    "dropout": ("model.dropout=1.0", "config.model.dropout=1.0 must be from 0 up to, not including, 1."),
    "negative learning rate": (
        "optimizer.learning_rate=-1e-3",
        "config.optimizer.learning_rate=-0.001 must be above 0.",
    ),
    "learning rate not a number": ("optimizer.learning_rate=nan", "must be a finite number."),
    "warmup longer than the run": ("train.steps=5", "Lower them, say to --config.optimizer.warmup_steps=0"),
    "no steps": ("train.steps=0", "config.train.steps=0 must be 1 or more."),
    "no layers": ("model.num_layers=0", "config.model.num_layers=0 must be 1 or more."),
    "embed_dim and heads": ("model.embed_dim=33", "is not divisible by num_heads=4. Nearest: embed_dim=32 or 36"),
    "heads and kv heads": ("model.num_kv_heads=3", "is not divisible by num_kv_heads=3. Nearest: num_kv_heads=2 or 4."),
    "odd head_dim under rope": ("model.positions=rope --config.model.head_dim=7", "head_dim=7 is odd"),
    "length": ("data.length=32", "config.data.length=32 is above config.model.max_length=16."),
}


@pytest.mark.parametrize(("override", "says"), FIELDS.values(), ids=FIELDS.keys())
def test_fields(experiment, override, says, capsys):
    argv = ["train", f"--config={experiment}", "--workdir=x", *f"--config.{override}".split()]
    assert says in mistake(argv, capsys)


LAYOUTS = {  # on 8 devices
    "more than the devices": ("mesh.data=16", "data=16 = 16 devices, but there are 8. Nearest mesh that fits"),
    "not the devices": ("mesh.model=3", "does not divide the 8 devices"),
    "two -1": ("mesh.model=-1", "only one axis may be -1"),
    "size 0": ("mesh.model=0", "config.mesh.model=0 must be 1 or more, or -1"),
    "pipeline": ("mesh.pipeline=8", "num_layers=2 is less than the 8 stages of the pipeline"),
    "a schedule without backwards": (
        "mesh.pipeline=2 --config.layout.schedule=forward_only",
        "config.layout.schedule='forward_only' is no schedule. Choose from: 1f1b,",
    ),
    "unknown pipeline schedule, without a pipeline": ("layout.schedule=1f1", "is no schedule. Did you mean '1f1b'?"),
    "batch over stages": (
        "mesh.pipeline=2 --config.layout.rule_overrides=batch=data+pipeline",
        "layout rule 'batch=data+pipeline': config.mesh.pipeline=2 deals the layers to stages",
    ),
    "vocabulary over stages": ("mesh.pipeline=2 --config.layout.rule_overrides=vocab=pipeline", "of the axis vocab."),
    "heads and model": (
        "mesh.model=8",
        "not divisible by config.mesh.model=8, which splits heads. Nearest: num_heads=8; or config.mesh.model=4.",
    ),
    "mlp and model": (
        "mesh.model=4 --config.model.mlp_dim=130",
        "by config.mesh.model=4, which splits mlp. Nearest: mlp_dim=128 or 132; or config.mesh.model=2.",
    ),
    "kv heads and model": (
        "mesh.model=4 --config.model.num_heads=12 --config.model.num_kv_heads=6 --config.model.embed_dim=48",
        "num_kv_heads=6 does not go with config.mesh.model=4, which splits kv_heads: one must divide the other. "
        "Nearest: num_kv_heads=4 or 12.",
    ),
    "batch": (
        "data.batch_size=12",
        "batch_size=12 is not divisible by config.mesh.data=8. Nearest: batch_size=8 or 16.",
    ),
    "batch and microbatches": (
        "layout.num_microbatches=3",
        "not divisible by config.mesh.data=8 x config.layout.num_microbatches=3. Nearest: batch_size=24.",
    ),
    "length and sequence parallelism": (
        "mesh.model=4 --config.layout.sequence_parallel --config.data.length=10",
        "which splits residual_length. Nearest: length=8 or 12; or config.mesh.model=2.",
    ),
    "length and context": (
        "mesh.context=4 --config.data.length=12",
        "length=12 is not divisible by 2 x config.mesh.context=4: each part of a sequence is an early chunk and a late "
        "one. Nearest: length=8 or 16.",
    ),
    "length, context and sequence parallelism": (
        "mesh.context=2 --config.mesh.model=4 --config.layout.sequence_parallel --config.data.length=10",
        "is not divisible by 2 x config.mesh.context=2: each part of a sequence is an early chunk and a late one. "
        "Nearest: length=8 or 16.",
    ),
    "cudnn and context": (
        "mesh.context=2 --config.layout.attention=cudnn",
        "'cudnn' does not attend over a sequence that is split in 2 (config.mesh.context). Use 'auto' or 'xla'.",
    ),
    "unknown rules": (
        "layout.rules=megatorn",
        "config.layout.rules='megatorn' is no rule set. Did you mean 'megatron'?",
    ),
    "unknown logical axis": ("layout.rule_overrides=mpl=model", "no such logical axis. Did you mean 'mlp'?"),
    "unknown mesh axis": ("layout.rule_overrides=mlp=modle", "no such mesh axis. Did you mean 'model'?"),
    "axis twice in a row": ("layout.rule_overrides=mlp=model+model", "names a mesh axis twice"),
    "rule that shards nothing": (
        "mesh.model=2 --config.layout.rule_overrides=head_dim=expert",
        "'head_dim=expert' shards nothing: config.mesh.expert=1, so layers.attention.",
    ),
    "rule for an axis that is not there": (
        "mesh.model=2 --config.model.positions=rope --config.layout.rule_overrides=positions=model",
        "'positions=model' shards nothing: no parameter of this model has the axis positions.",
    ),
    "rule that does not divide": (
        "mesh.model=4 --config.model.max_length=18 --config.layout.rule_overrides=positions=model",
        "config.mesh.model=4 does not divide the axis positions of position_embedding [positions=18, embed=32].",
    ),
    "mesh axis twice in a parameter": (
        "mesh.model=2 --config.layout.rule_overrides=embed=model",
        "embedding.table: layout rules split both 'vocab' and 'embed' of a tensor [vocab, embed] over mesh axis",
    ),
    "mesh axis twice in an activation": (
        "mesh.model=2 --config.layout.rule_overrides=mlp=data",
        "the hidden units of the mlp: layout rules split both 'batch' and 'mlp'",
    ),
    "override without =": ("layout.rule_overrides=mlp", "is not of the form logical_axis=mesh_axis"),
}


@pytest.mark.parametrize(("override", "says"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(experiment, override, says, capsys):
    argv = ["train", f"--config={experiment}", "--workdir=x", *f"--config.{override}".split()]
    assert says in mistake(argv, capsys)


@pytest.mark.parametrize(
    "argv", [["trian"], ["train", "--wrkdir=x"], ["train", "--config=no/such.py", "--workdir=x"]], ids=" ".join
)
def test_as_a_real_command(argv):
    program = "import sys; from jaxllm.cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("jaxllm: ")
    assert len(done.stderr.splitlines()) <= 2
