"""The model card of an exported student: the run's facts, and nothing that the run does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

FIGURES = {  # row of the card -> what summary.json calls it, before and after
    "held-out accuracy, greedy": ("accuracy_before", "accuracy_after"),
    "reverse KL to the teacher, nats per token": ("reverse_kl_before", "reverse_kl_after"),
    "top-1 agreement with the teacher": ("top1_agreement_before", "top1_agreement_after"),
}
SUPPORTS = {
    "teacher": "the teacher's top tokens",
    "student": "the student's candidates",
    "union": "the teacher's top tokens, the student's candidates",
    "auto": "the tokens that the teacher scored",
}


def model_card(
    name: str, config: dict[str, Any], summary: dict[str, Any], *, support: str, step: int, dtype: str
) -> ModelCard:
    """`config`: a run's settings. `summary`: its summary.json, or {} where nothing was measured at this step.

    `support`: loss.support with auto decided, where the run has said how.
    """
    base, teacher = Path(config["student"]["path"]), Path(config["teacher"]["path"])
    licence = licence_of(base)
    data = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["on-policy-distillation", "knowledge-distillation"],
    )
    sections = [
        f"# {name}",
        f"{base.name}, distilled from {teacher.name}: the teacher scored answers token by token, and the student "
        "learnt from the scores.",
        "## Training\n\n" + table(("setting", "value"), training_facts(config, support, step, dtype)),
        "## Figures\n\n" + figures(summary),
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n\n`vllm serve {name}` serves it.',
        "## Licence\n\n" + licence_note(base.name, licence, teacher),
    ]
    if summary.get("versions"):
        made_with = [f"{package} {version}" for package, version in summary["versions"].items()]
        sections.insert(4, "## Made with\n\n" + ", ".join(made_with) + f"; commit {summary.get('git_commit')}.")
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def events_of(loss: dict[str, Any], support: str) -> str:
    """What the divergence was a sum over."""
    if loss.get("payload") == "hidden":
        return "every token, from the teacher's hidden states"
    residual = ", with the residual of the sampled token" if loss.get("residual") else ""
    return f"{SUPPORTS[support]} and one rest bucket{residual}"


def training_facts(config: dict[str, Any], support: str, step: int, dtype: str) -> list[tuple[str, Any]]:
    data, rollout, learner = config["data"], config["rollout"], config["learner"]
    return [
        ("base model", Path(config["student"]["path"]).name),
        ("teacher", Path(config["teacher"]["path"]).name),
        ("answers written by", config.get("answers", "student")),
        ("tokens trained on", selection(config)),
        ("loss", f"{config['loss']['divergence']}, on {events_of(config['loss'], support)}"),
        ("steps", f"{step} of {config['num_steps']}"),
        ("answers per step", data["prompts_per_step"] * data["samples_per_prompt"]),
        ("sampling", f"temperature {rollout['temperature']}, at most {rollout['max_response_tokens']} tokens"),
        ("learning rate", f"{learner['learning_rate']}, {learner['schedule']}"),
        ("prompts", Path(data["train_path"]).name),
        ("seed", config["seed"]),
        *adapter(config["student"].get("lora") or {}),
        ("weights", f"{dtype}; trained in float32, computed in {config['student']['dtype']}"),
    ]


def adapter(lora: dict[str, Any]) -> list[tuple[str, Any]]:
    """What trained, where it was not the student itself."""
    if not lora.get("rank"):
        return []
    layers = ", ".join(lora["targets"]) or "every linear layer"
    return [("trained", f"a LoRA adapter of rank {lora['rank']}, alpha {lora['alpha']:g}, beside {layers}; merged")]


def selection(config: dict[str, Any]) -> str:
    """The token selection in words; a run of opsd.train has none."""
    chosen = config.get("selector")
    if chosen is None or chosen["name"] == "all":
        return "every token"
    return f"{chosen['score']} ({chosen['name']}), ratio {chosen['ratio']:g} of each {chosen['scope']}"


def figures(summary: dict[str, Any]) -> str:
    if not summary:
        return "Nothing was measured at this step."
    rows = [(row, shown(summary[before]), shown(summary[after])) for row, (before, after) in FIGURES.items()]
    text = table(("on held-out prompts", "before", "after"), rows)
    if summary["teacher_accuracy"] is not None:
        text += f"\n\nThe teacher's accuracy on the same prompts: {shown(summary['teacher_accuracy'])}."
    return text


def licence_note(base_name: str, licence: str | None, teacher: Path) -> str:
    stated = f"stated as {licence}" if licence else "not stated in its folder: look it up before you publish this model"
    return (
        f"These weights derive from {base_name}, whose licence also binds them ({stated}). They were trained on scores "
        f"of {teacher.name}: some licences restrict what may be trained with a model's output (its licence here: "
        f"{licence_of(teacher) or 'not stated'})."
    )


def licence_of(folder: Path) -> str | None:
    """As the folder's own model card states it."""
    card = folder / "README.md"
    return ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
