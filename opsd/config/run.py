"""Every setting of a run, with its default. YAML files and recipes state only what differs from these.

Hydra composes and overrides; `compose_config` turns the result into these dataclasses once, in `main()`. A value out
of range, an unknown key and a missing path all raise ConfigError there, before a model is loaded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from opsd.config.checks import at_least, check_values, in_range, one_of, positive
from opsd.config.engine import DTYPES, RolloutConfig, TeacherConfig
from opsd.config.lora import LoraConfig
from opsd.config.loss import LossConfig
from opsd.config.placement import PlacementConfig, ScheduleConfig
from opsd.config.secrets import refuse_secrets
from opsd.config.tools import ToolsConfig
from opsd.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

MISSING: Any = "???"  # omegaconf's own; written out, so that the learner's parts import without it
STATS = ("rollout", "learner")


@dataclass
class StudentConfig:
    path: str = MISSING  # a Hugging Face folder
    # Of the forward and backward pass, and of weights that lora freezes; those that train are float32. float32 |
    # bfloat16 | auto, the programs' default: bfloat16 on a GPU, float32 on the CPU.
    dtype: str = "float32"
    trust_remote_code: bool = False  # run Python code that lies in the model's folder
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        one_of("student.dtype", self.dtype, DTYPES)


@dataclass
class PromptConfig:
    """How a row of a data file becomes a prompt, and its answers are graded: the same in training and evaluation."""

    prompt_key: str = "prompt"  # field with the prompt: a string, or a list of {role, content}; "a.b": b inside of a
    answer_key: str = ""  # field with the reference answer; empty: answer, or verl's reward_model.ground_truth
    # The tokenizer's chat template: auto, for lists of messages (an error where it has none), while strings stay plain
    # text | true, for strings too, each as a message of the user's | false, the contents joined by newlines.
    chat_template: str = "auto"
    template_options: dict[str, Any] = field(default_factory=dict)  # for that template, e.g. {enable_thinking: false}
    instruction: str = ""  # appended to every prompt, after a newline
    # What is compared with the reference: final_hash, the number or text after the last # (GSM8K) | math, the final
    # expression, boxed or not | boxed, the last \\boxed{} | answer_line, what follows the last "Answer:" | auto, by the
    # row's data_source as verl has it (openai/gsm8k: final_hash; MATH and numina: boxed; math_dapo and aime:
    # answer_line) | deepplanning, a travel plan's score in [0, 1] (docs/deepplanning.md) | none |
    # package.module:function, one of your own: (response, reference answer) -> bool, or what else opsd.data.grading
    # says. A thought, up to the last </think>, is never looked at. final_hash takes a percent sign as a unit like any
    # other; for those of mathematics 50% is 0.5, and also 50, as math-verify has it.
    grader: str = "none"
    max_prompt_tokens: int = 2048  # the models' context, less a response, may allow less
    # A prompt with more tokens: refuse, at start-up | drop the row | truncate_left, cut its beginning off. One with
    # more characters than twice so many of the vocabulary's longest tokens is too long without being tokenised.
    overlong: str = "refuse"

    def __post_init__(self) -> None:
        self.chat_template = str(self.chat_template).lower()  # YAML's true and false too
        one_of("data.chat_template", self.chat_template, ("auto", "true", "false"))
        one_of("data.overlong", self.overlong, ("refuse", "drop", "truncate_left"))
        at_least("data.max_prompt_tokens", self.max_prompt_tokens, 1)


@dataclass
class DataConfig(PromptConfig):
    train_path: str = MISSING  # JSONL or parquet, one prompt per row
    eval_path: str = ""  # the same, held-out prompts; empty: the run is not evaluated
    teacher_template: str = ""  # the prompt as the teacher sees it, with {prompt} and {solution}; empty: as the student
    solution_key: str = ""  # field that stands for {solution}; empty: the reference answer
    # Field with a whole answer, for methods that train on such: a string, or, where it is the prompt_key again, that
    # conversation's last turn. Empty: none.
    response_key: str = ""
    prompts_per_step: int = 64  # of the file that a step takes
    samples_per_prompt: int = 1  # answers of the student to each of them
    shuffle: bool = True  # another order in every pass, by the seed; false: the file's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_template and "{prompt}" not in self.teacher_template:
            raise ConfigError(f"data.teacher_template must hold {{prompt}}, got {self.teacher_template!r}")
        for name in ("prompts_per_step", "samples_per_prompt"):
            at_least(f"data.{name}", getattr(self, name), 1)


@dataclass
class LearnerConfig:
    num_workers: int = 1  # FSDP2 ranks
    learning_rate: float = 1e-6  # the highest, after the warm-up
    schedule: str = "cosine"  # cosine | constant
    warmup_steps: int = 0  # over which it rises from nearly zero
    min_lr_ratio: float = 0.0  # cosine falls to this share of learning_rate
    weight_decay: float = 0.0  # AdamW's
    adam_betas: tuple[float, float] = (0.9, 0.999)  # AdamW's
    max_grad_norm: float = 1.0  # a larger gradient is scaled down to this norm
    # A step whose loss or gradient is NaN or infinite is skipped: weights, optimiser and learning rate stay as they
    # are. So many in a row; one more ends the run.
    max_skipped_steps: int = 3
    micro_batch_tokens: int = 16384  # packed tokens of one forward pass; a longer rollout goes alone
    activation_checkpointing: bool = False  # keep each layer's input only; a second forward pass in the backward pass
    cpu_offload: bool = False  # GPU only: weights, gradients and optimiser live in host memory, a layer at a time on it
    compile: bool = False  # torch.compile each layer: faster steps on a GPU after a slow first one; not run on a GPU
    cpu_threads: int = 1  # of each rank, on the CPU

    def __post_init__(self) -> None:
        one_of("learner.schedule", self.schedule, ("cosine", "constant"))
        positive("learner.learning_rate", self.learning_rate)
        positive("learner.max_grad_norm", self.max_grad_norm)
        in_range("learner.min_lr_ratio", self.min_lr_ratio, 0.0, 1.0)
        at_least("learner.weight_decay", self.weight_decay, 0)
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ConfigError(f"learner.adam_betas must be two numbers in [0, 1), got {list(self.adam_betas)}")
        for name in ("warmup_steps", "max_skipped_steps"):
            at_least(f"learner.{name}", getattr(self, name), 0)
        for name in ("num_workers", "micro_batch_tokens", "cpu_threads"):
            at_least(f"learner.{name}", getattr(self, name), 1)


@dataclass
class EvalConfig:
    every: int = 50  # steps between evaluations; 0: only before and after
    num_problems: int = 500  # greedy accuracy over the first N rows of data.eval_path
    num_kl_prompts: int = 128  # sampled answers for the KL to the teacher and the top-1 agreement; 0: neither
    teacher: bool = True  # also measure the teacher's accuracy

    def __post_init__(self) -> None:
        for name in ("every", "num_problems", "num_kl_prompts"):
            at_least(f"eval.{name}", getattr(self, name), 0)


@dataclass
class CheckpointConfig:
    every: int = 100  # steps; 0: only at the end
    keep: int = 2  # newest checkpoints that stay
    # The best one stays, too: by held-out accuracy, or where nothing is graded by the reverse KL, of the evaluation at
    # its step (eval.every).
    keep_best: bool = False
    # Write while the next steps run: a save takes the time of a copy, and each rank needs host memory for one of its
    # weights and moments.
    in_background: bool = False

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 0)
        at_least("checkpoint.keep", self.keep, 1)


@dataclass
class LogConfig:
    # auto: as WANDB_MODE or a stored `wandb offline` says, else online where there is a login, else offline | off
    wandb: str = "auto"
    project: str = "opsd"  # of wandb
    dashboard: bool = True  # Ray dashboard
    token_view_every: int = 50  # steps between the rollouts kept for the report's token view
    token_view_rollouts: int = 4  # how many of such a step

    def __post_init__(self) -> None:
        one_of("log.wandb", self.wandb, ("auto", "off"))
        at_least("log.token_view_every", self.token_view_every, 1)
        at_least("log.token_view_rollouts", self.token_view_rollouts, 0)


@dataclass
class RunConfig:
    """A run of `python -m opsd.train`: plain on-policy distillation, or what `hooks` makes of it."""

    output_dir: str = MISSING  # the run's folder: settings, metrics, checkpoints, report and the trained student
    num_steps: int = 300  # optimiser steps
    num_epochs: int = 0  # passes over the training prompts, in place of num_steps; 0: num_steps counts
    seed: int = 0  # of the prompts' order, the answers and the selection
    device: str = "auto"  # auto | cpu | cuda
    hooks: str = "opsd.hooks:build_hooks"  # package.module:function, given this config, returns TrainHooks
    hook_options: dict[str, Any] = field(default_factory=dict)  # free: what a build_hooks of your own reads
    resume: str = "never"  # never | auto: continue from the newest checkpoint in output_dir
    # With resume=auto: go on although settings, data or models differ from the run's beginning in what it learns.
    resume_changed: bool = False
    overwrite: bool = False  # delete an earlier run in output_dir
    # rollout | learner: whose log-probabilities entropy and divergence of a token come from. A further forward pass of
    # the student (learner) makes the entropy exact; the divergences stay on the tokens that the teacher scored.
    stats: str = "rollout"
    # How often engines of one role whose process is lost are started again, with the weights that they had; and how
    # often the run starts itself again, from its newest checkpoint, where that is not possible.
    max_restarts: int = 3
    stop_at_step: int = 0  # save a checkpoint and stop there, for a queue with a time limit; 0: run to num_steps
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check_values(self)
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        one_of("resume", self.resume, ("never", "auto"))
        one_of("stats", self.stats, STATS)
        at_least("num_steps", self.num_steps, 1)
        at_least("num_epochs", self.num_epochs, 0)
        if self.num_epochs and self.num_steps != RunConfig.num_steps:
            raise ConfigError(
                f"num_steps={self.num_steps} and num_epochs={self.num_epochs} contradict each other: "
                "set num_epochs=0 to count in steps"
            )
        at_least("seed", self.seed, 0)
        at_least("stop_at_step", self.stop_at_step, 0)
        at_least("max_restarts", self.max_restarts, 0)
        if not self.num_epochs and self.stop_at_step > self.num_steps:
            raise ConfigError(f"stop_at_step={self.stop_at_step} is beyond the run's last step, {self.num_steps}")
        if self.loss.residual:
            self._check_draws()
        if self.schedule.max_staleness:
            self._check_ahead()
        if self.resume == "auto" and self.overwrite:
            raise ConfigError("resume=auto and overwrite=true contradict each other: choose one")

    def _check_draws(self) -> None:
        """Refuses answers that are no draws from the student's whole distribution at temperature 1."""
        for name in ("temperature", "top_p"):
            value = getattr(self.rollout, name)
            if value != 1.0:
                raise ConfigError(
                    f"loss.residual=true needs rollout.{name}=1, got {value}: its gradient is right on average over "
                    "answers drawn from the student's whole distribution"
                )

    def _check_ahead(self) -> None:
        """Refuses what cannot be made while the learner works, or would be wrong with older weights' answers."""
        direct = self.schedule.partial_rollouts and self.rollout.weight_transfer in ("nccl", "ipc")
        if direct:  # both sides take part in them, so an engine cannot leave them until it has made a step
            raise ConfigError(
                f"schedule.partial_rollouts=true needs rollout.weight_transfer=object_store or auto, got "
                f"{self.rollout.weight_transfer}: an engine takes weights in between its steps from where they lie"
            )
        refused = {
            "placement.mode=colocated": self.placement.mode == "colocated",  # the roles take turns on its GPUs
            "teacher.follow_decay": self.teacher.follow_decay is not None,  # which teacher scored would be chance
            "loss.residual=true": self.loss.residual,  # its gradient is right for the newest weights' draws alone
        }
        for setting in (name for name, is_set in refused.items() if is_set):
            raise ConfigError(
                f"{setting} needs schedule.max_staleness=0, got {self.schedule.max_staleness}: answers that are made "
                "ahead are those of older weights, made while the learner works"
            )


Config = TypeVar("Config")


def compose_config(hydra_cfg: DictConfig, config_class: type[Config]) -> Config:
    """The typed config of what Hydra composed. Raises ConfigError that names the field."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        cfg: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_class), hydra_cfg))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(" ".join(str(error).split())) from error
    refuse_secrets(asdict(cfg))
    return cfg
