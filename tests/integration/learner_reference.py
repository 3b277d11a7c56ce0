"""What the learner's gradients are compared with: a plain model, sequence by sequence, through full logits."""

import torch
from transformers import AutoModelForCausalLM

from opsd.learner.packing import pack
from opsd.types import Selection, Vocabulary
from tests.opsd.builders import batch_of, scored_rollouts

VOCABULARY = Vocabulary(size=60, stop_ids=(0, 5))  # the model has 64 rows: four of them are padding
LENGTHS = [5, 1, 9, 4, 7, 12]


def packed(num_ranks, max_tokens, keep, temperature=None):
    """A list of micro-batches for each rank. `temperature`: of a token by its index."""
    scored = batch_of(scored_rollouts(LENGTHS, VOCABULARY))
    index = torch.tensor([i for i in range(sum(LENGTHS)) if keep(i)])
    temperature_N = None if temperature is None else temperature(index)
    selection = Selection(index_N=index, weight_N=1.0 + (index % 3).float(), temperature_N=temperature_N)
    return pack(scored, selection, "teacher", VOCABULARY, num_ranks=num_ranks, max_tokens=max_tokens)


def plain_gradients(model_path, keep, temperature=None):
    """Full logits, one sequence at a time; merged stop ids, padding and temperatures done on dense probabilities."""
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    [alone] = packed(1, 0, keep, temperature)  # one sequence each
    for sequence in alone:
        logits = model(sequence.token_ids_L[None]).logits[0, sequence.row_N].double()
        given_N = sequence.temperature_N
        temperature_N1 = torch.ones(len(logits), 1) if given_N is None else given_N[:, None]
        events = torch.softmax(logits[:, : VOCABULARY.size], -1)
        stop = events[:, list(VOCABULARY.stop_ids)].sum(-1, keepdim=True)
        events = torch.cat([stop, events[:, 1:5], torch.zeros_like(stop), events[:, 6:]], 1)
        powers = torch.where(events > 0, events, 1.0) ** (1 / temperature_N1) * (events > 0)
        probs = powers / powers.sum(-1, keepdim=True)
        support = sequence.support_NU
        named = probs.gather(1, support.clamp_min(0)) * (support >= 0)
        student = torch.cat([named, 1 - named.sum(-1, keepdim=True)], 1)
        # The teacher's rest is taken to be shaped as the student's.
        rest = events.detach().scatter(1, support.where(support >= 0, 5), 0.0)  # 5 is no event of its own
        tail = ((rest / rest.sum(-1, keepdim=True)) ** (1 / temperature_N1)).sum(-1, keepdim=True)
        teacher = sequence.teacher_logprobs_NB.double().exp() ** (1 / temperature_N1)
        teacher = torch.cat([teacher[:, :-1], teacher[:, -1:] * tail], 1)
        teacher = teacher / teacher.sum(-1, keepdim=True)
        both = (student > 0) & (teacher > 0)
        ratio = torch.where(both, student, 1.0).log() - torch.where(both, teacher, 1.0).log()
        weight = sequence.weight_N * temperature_N1[:, 0] ** 2
        (weight * (student * ratio).sum(-1)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}
