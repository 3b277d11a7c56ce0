"""One chunk of rows through the heads of both models: logits of every token -> log-probabilities, terms, dL/dlogits.

The vocabulary goes by in blocks of columns, three times before the gradient is multiplied:

    normalise    both models' logits and, of each row, both normalisers; the student's likeliest token is set apart
    add_terms    log-probabilities -> the divergence's terms, probabilities p and G, see `opsd.ops.head.terms`
    finish       dL/dz_v = G_v - p_v sum_u G_u

Between them the buffer holds two numbers per row and token. All are float32 but what is one per row.

Where the student is all but certain, log p of its likeliest token, each divergence's term there and that token's entry
of the gradient are small differences of large numbers, rounding noise in float32. So they are made from the sums over
all other tokens, and in float64.
"""
# N rows of a chunk, D width, V vocabulary, C columns of a block, M blocks, K rows whose likeliest token is in a
# block, R a few rows, E stop ids

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from opsd.ops.head.buffer import HeadBuffer
from opsd.ops.head.chunks import inside, stop_logits
from opsd.ops.head.events import Events
from opsd.ops.head.form import CapSlopes, HeadForm, OutputHead, cap_slopes
from opsd.ops.head.gradients import linear
from opsd.ops.head.terms import LEAST_EXPONENT, NO_EVENT, Terms


class ModelRows(NamedTuple):
    """One model's rows and output head."""

    hidden_ND: Tensor  # in the dtype of the products' factors
    head: OutputHead

    def logits(self, columns: slice, events: Events, merged_N: Tensor | None) -> Tensor:
        """Of the events in these columns at the rows' temperatures, [N, C]; NO_EVENT in other columns.

        `merged_N`: the stop event's, see `stop_logits`. The one place where logits are made, but for that event's.
        """
        product_NC = linear(self.hidden_ND, self.head.weight_VD[columns].to(self.hidden_ND.dtype))
        logits_NC = self.head.logits_(product_NC, columns)
        if events.temperature_N is not None:
            logits_NC.div_(events.temperature_N[:, None])
        if merged_N is not None:
            for stop_id in inside(events.stop_ids, columns):
                logits_NC[:, stop_id - columns.start] = merged_N if stop_id == events.stop_ids[0] else NO_EVENT
        for foreign_id in inside(events.foreign_ids, columns):
            logits_NC[:, foreign_id - columns.start] = NO_EVENT
        return logits_NC


class Pair(NamedTuple):
    """Both models' distributions on a chunk of rows; the student first, wherever there are two of a thing."""

    blocks: list[slice]
    buffer: HeadBuffer  # [2N, C] of each block: its logits less their maximum; NO_EVENT in the row's likeliest token
    offset_NMs: list[Tensor]  # to be added to those of a block: then they are log-probabilities
    likeliest_N1s: list[Tensor]  # float64, log-probabilities of the token that the student finds likeliest
    places: list[tuple[Tensor, Tensor]]  # of each block: rows [K] whose likeliest token is in it, and its column there
    stop_prob_NE: Tensor | None  # how the stop event's probability divides among the stop ids, of the student
    form: HeadForm  # of the student's head
    slopes: CapSlopes | None  # of its soft cap, where it has one
    likeliest_logit_N1: Tensor  # the student's, before a temperature

    def of(self, columns: slice) -> tuple[Tensor, Tensor]:
        """What the buffer holds of a block, [N, C] of either model."""
        student_NC, teacher_NC = self.buffer.revise(columns).chunk(2)
        return student_NC, teacher_NC

    def whole_rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Log-probabilities [R, V] of all tokens of a few rows, before `add_terms`."""
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for number, columns in enumerate(self.blocks):
            row_K, place_K = self.places[number]
            for part, shifted_NC, offset_NM, likeliest_N1 in zip(
                parts, self.of(columns), self.offset_NMs, self.likeliest_N1s, strict=True
            ):
                logprobs_RC = shifted_NC[rows] + offset_NM[rows, number, None]
                here_K = (row_K >= rows.start) & (row_K < rows.stop)
                found = row_K[here_K]
                logprobs_RC[found - rows.start, place_K[here_K]] = likeliest_N1[found, 0].to(logprobs_RC.dtype)
                part.append(logprobs_RC)
        return torch.cat(parts[0], dim=1), torch.cat(parts[1], dim=1)


class Slopes(NamedTuple):
    """G as far as it is one number per row: float64 [N, 1]."""

    likeliest_N1: Tensor  # of the likeliest token
    others_N1: Tensor  # the sum over all other tokens


def normalise(student: ModelRows, teacher: ModelRows, events: Events, buffer: HeadBuffer, blocks: list[slice]) -> Pair:
    """Both distributions of a chunk, which begins in `buffer`: the Pair is valid until the next one does."""
    models = student, teacher
    stops = [stop_logits(model.hidden_ND, model.head, events) for model in models]
    max_N1s: tuple[list[Tensor], list[Tensor]] = ([], [])  # of either model, in each block
    sum_N1s: tuple[list[Tensor], list[Tensor]] = ([], [])
    buffer.begin(2 * len(student.hidden_ND))
    for columns in blocks:
        for number, shifted_NC in enumerate(buffer.put(columns).chunk(2)):
            logits_NC = models[number].logits(columns, events, stops[number][1])
            max_N1 = logits_NC.amax(1, keepdim=True)
            torch.sub(logits_NC, max_N1, out=shifted_NC)
            torch.clamp(shifted_NC, min=LEAST_EXPONENT, out=logits_NC)
            sum_N1s[number].append(logits_NC.exp_().sum(1, keepdim=True).double())
            max_N1s[number].append(max_N1.double())
            del logits_NC  # the next block's take their place
    max_NMs = torch.cat(max_N1s[0], dim=1), torch.cat(max_N1s[1], dim=1)
    sum_NMs = torch.cat(sum_N1s[0], dim=1), torch.cat(sum_N1s[1], dim=1)
    places, logit_N1s = _set_likeliest_apart(buffer, blocks, max_NMs, sum_NMs)
    offset_NMs, likeliest_N1s = [], []
    for max_NM, sum_NM, logit_N1 in zip(max_NMs, sum_NMs, logit_N1s, strict=True):
        others_N1 = (max_NM + sum_NM.log()).logsumexp(1, keepdim=True)
        offset_NMs.append((max_NM - torch.logaddexp(others_N1, logit_N1)).to(buffer.apart.dtype))
        likeliest_N1s.append(-torch.logaddexp(torch.zeros_like(logit_N1), others_N1 - logit_N1))
    stop_NE, form = stops[0][0], student.head.form
    logit_N1, logsumexp_N1 = logit_N1s[0], logit_N1s[0] - likeliest_N1s[0]
    no_names_N0 = buffer.apart.new_empty(len(logit_N1), 0)
    return Pair(
        blocks=blocks,
        buffer=buffer,
        offset_NMs=offset_NMs,
        likeliest_N1s=likeliest_N1s,
        places=places,
        stop_prob_NE=None if stop_NE is None else stop_NE.softmax(1),
        form=form,
        slopes=cap_slopes(form, events, no_names_N0, stop_NE, logsumexp_N1.expand(-1, len(blocks))),
        likeliest_logit_N1=logit_N1 if events.temperature_N is None else logit_N1 * events.temperature_N[:, None],
    )


def add_terms(pair: Pair, terms: Terms, weight_N: Tensor | None) -> tuple[Tensor, Slopes | None]:
    """The chunk's values [N], float64; and, unless the weights are None, what `finish` needs to know of the gradient.

    Then the buffer holds, of each block, p and G after it, of the likeliest tokens neither.
    """
    student_N1, teacher_N1 = (logprob_N1.clone() for logprob_N1 in pair.likeliest_N1s)
    value_N = terms(student_N1, teacher_N1, weight_N)
    others_N1 = torch.zeros_like(teacher_N1)
    for number, columns in enumerate(pair.blocks):
        student_NC, teacher_NC = (
            shifted_NC.add_(offset_NM[:, number, None])
            for shifted_NC, offset_NM in zip(pair.of(columns), pair.offset_NMs, strict=True)
        )
        value_N = value_N + terms(student_NC, teacher_NC, weight_N).double()
        if weight_N is not None:
            others_N1 += teacher_NC.sum(1, keepdim=True).double()
    return value_N, None if weight_N is None else Slopes(teacher_N1, others_N1)


def finish(pair: Pair, slopes: Slopes, events: Events) -> Tensor:
    """Makes the gradient in the student's products of what `add_terms` left in the buffer: through a temperature, the
    stop ids, a soft cap and a scale.

    Returns sum_v |dL/dz_v| [N, 1]. The likeliest token's is minus the sum of all others', G_u (1 - p_u) - p_u sum G.
    Under a soft cap a token whose probability underflowed to 0 has no gradient: its logit is not known any more.
    """
    logprob_N1 = pair.likeliest_N1s[0]
    grad_N = (-slopes.likeliest_N1 * logprob_N1.expm1() - logprob_N1.exp() * slopes.others_N1)[:, 0]
    total_N1 = slopes.likeliest_N1 + slopes.others_N1
    stop_N = None
    row_sum_N1 = torch.zeros_like(total_N1)
    stop_part_NE = _stop_parts(pair)
    for number, (columns, (row_K, place_K)) in enumerate(zip(pair.blocks, pair.places, strict=True)):
        probs_NC, grad_NC = pair.of(columns)
        grad_NC.addcmul_(probs_NC, total_N1.to(grad_NC.dtype), value=-1.0)
        grad_NC[row_K, place_K] = grad_N[row_K].to(grad_NC.dtype)
        if pair.slopes is not None:
            grad_NC.mul_(_slopes(pair, pair.slopes, probs_NC, number))
        if pair.form.scale != 1.0:
            grad_NC.mul_(pair.form.scale)
        if stop_part_NE is not None:
            for stop_id in inside(events.stop_ids, columns):
                column = stop_id - columns.start
                stop_N = grad_NC[:, column].clone() if stop_N is None else stop_N  # of the event, the lowest id's
                grad_NC[:, column] = stop_N * stop_part_NE[:, events.stop_ids.index(stop_id)]
        if events.temperature_N is not None:
            grad_NC.div_(events.temperature_N[:, None])
        row_sum_N1 += torch.abs(grad_NC, out=probs_NC).sum(1, keepdim=True).double()
    return row_sum_N1.to(grad_NC.dtype)


def _slopes(pair: Pair, slopes: CapSlopes, probs_NC: Tensor, number: int) -> Tensor:
    """The cap's derivative [N, C] at every event of a block; `number`: the block's."""
    columns, (row_K, place_K) = pair.blocks[number], pair.places[number]
    slope_NC = slopes.of_shares(probs_NC, columns, number)
    of_likeliest_K = pair.form.slope_(pair.likeliest_logit_N1[row_K, 0].to(slope_NC.dtype))
    if slopes.event_id is not None:
        of_likeliest_K.masked_fill_(place_K == slopes.event_id - columns.start, 1.0)
    slope_NC[row_K, place_K] = of_likeliest_K
    return slope_NC


def _stop_parts(pair: Pair) -> Tensor | None:
    """What each stop id [N, E] gets of the event's gradient: its share of the event, by its own slope."""
    if pair.stop_prob_NE is None or pair.slopes is None or pair.slopes.stop_NE is None:
        return pair.stop_prob_NE
    return pair.stop_prob_NE * pair.slopes.stop_NE


def logit_gradient(pair: Pair) -> Iterator[tuple[slice, Tensor]]:
    """dL/dlogits [N, C] of one block after another, from the first; each is valid until the next one."""
    largest = None
    for columns in pair.blocks:
        _, grad_NC = pair.buffer.take(columns).chunk(2)
        largest = torch.empty_like(grad_NC).view(-1) if largest is None else largest  # the first block is the largest
        # A copy, as what is made of it may be written over it.
        yield columns, largest[: grad_NC.numel()].view(grad_NC.shape).copy_(grad_NC)


def _set_likeliest_apart(
    buffer: HeadBuffer, blocks: list[slice], max_NMs: tuple[Tensor, Tensor], sum_NMs: tuple[Tensor, Tensor]
) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Takes the token that the student finds likeliest out of each row, of buffer and sums of both models.

    Returns where it is, as in `Pair.places`, and its logit [N, 1] in either model.
    """
    best_N = max_NMs[0].argmax(1)
    logit_N1s = torch.empty_like(max_NMs[0][:, :1]), torch.empty_like(max_NMs[1][:, :1])
    places = []
    for number, columns in enumerate(blocks):
        both = buffer.revise(columns).chunk(2)
        row_K = (best_N == number).nonzero()[:, 0]
        place_K = both[0][row_K].argmax(1)
        places.append((row_K, place_K))
        for shifted_NC, max_NM, sum_NM, logit_N1 in zip(both, max_NMs, sum_NMs, logit_N1s, strict=True):
            logit_N1[row_K, 0] = shifted_NC[row_K, place_K].double() + max_NM[row_K, number]
            shifted_NC[row_K, place_K] = NO_EVENT
            sum_NM[row_K, number] = shifted_NC[row_K].exp().sum(1).double()
    return places, logit_N1s
