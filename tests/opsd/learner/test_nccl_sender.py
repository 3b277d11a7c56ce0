"""What a learner rank sends over NCCL or CUDA IPC, and what engines are told; that it arrives needs GPUs."""

from types import SimpleNamespace

import pytest
import torch

from opsd.engines.weights import complete_weights
from opsd.learner.loading import load_student
from opsd.learner.model import DistillationModel, shard
from opsd.models.weights import model_without_weights
from opsd.ops.losses.divergences import reverse_kl
from opsd.types import Vocabulary
from tests.opsd.process_group import one_rank
from tests.tiny_models import make_tiny_qwen3

pytestmark = pytest.mark.slow  # they import vLLM


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_is_sent_is_announced_and_is_the_whole_model(tied, tmp_path):
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    from opsd.learner.nccl_sender import TrainedWeights

    path = str(make_tiny_qwen3(tmp_path, tied=tied, seed=3, eos_token_id=0))
    expected = load_student(path, attention="sdpa", trust_remote_code=False).state_dict()
    with one_rank():
        causal_lm = load_student(path, attention="sdpa", trust_remote_code=False)
        model = DistillationModel(causal_lm, reverse_kl, Vocabulary(size=64, stop_ids=(0,)))
        shard(model, device="cpu", num_ranks=1, dtype="float32")
        source = TrainedWeights(model, torch.bfloat16, torch.device("cpu"))
        # vLLM's sender checks names, order, dtypes and shapes against the announcement while it sends.
        sent = dict(NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata()))
    assert complete_weights(model_without_weights(path, trust_remote_code=False), sent).keys() == sent.keys()
    for name, weight in sent.items():
        assert torch.equal(weight, expected[name].bfloat16()), name


@pytest.mark.parametrize(
    ("ranks_each", "told"),
    [
        (2, [{"packed": True, "rank_offset": 1}, {"packed": True, "rank_offset": 3}]),
        (None, [{"packed": True}, {"packed": True}]),
    ],
    ids=["nccl", "ipc"],
)
def test_each_engine_is_told_its_place_and_takes_nothing_else(monkeypatch, ranks_each, told):
    """vLLM turns what it is told into the backend's own dataclass, which refuses an unknown field."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo

    from opsd.learner import nccl_sender

    calls = []
    workers = [SimpleNamespace(weight_transfer=SimpleNamespace(remote=lambda *a: calls.append(a))) for _ in range(2)]
    monkeypatch.setattr(nccl_sender, "gather", lambda stage, refs: list(refs))
    nccl_sender.EngineGroup(workers, ranks_each).init_weight_transfer_engine({"packed": True})
    assert calls == [("init_weight_transfer_engine", {"init_info": place}) for place in told]
    if ranks_each is None:
        assert IPCWeightTransferInitInfo(**told[0]).packed
