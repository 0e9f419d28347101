"""On a GPU: features equal to those of the CPU up to rounding, and neighbors equal to the bit."""

import pytest
import torch
import torch.nn.functional as F

from hpcssl.distributed.world import World
from hpcssl.evals.common.encoder import FrozenEncoder
from hpcssl.evals.common.extract import extract_features
from hpcssl.evals.common.features import Features
from hpcssl.evals.common.options import FeatureOptions
from hpcssl.evals.frozen import knn
from hpcssl.evals.run import evaluate
from tests.tolerances import rounding

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_features_and_scores_agree_with_the_cpu(data, weights_file):
    gpu, cpu = World.single_process("cuda"), World.single_process()
    # fp32 convolutions may use TF32, whose precision is that of fp16; see test_bf16_features_are_close_to_fp32
    for precision, dtype in (("fp32", torch.float16), ("bf16", torch.bfloat16)):
        close = rounding(dtype, 21, scale=128**-0.5)
        options = FeatureOptions(forward_batch=32, precision=precision)
        features = extract_features(FrozenEncoder.open(weights_file, gpu), data[0], options, gpu)
        expected = extract_features(
            FrozenEncoder.open(weights_file, cpu), data[0], FeatureOptions(forward_batch=32), cpu
        )
        torch.testing.assert_close(
            F.normalize(torch.cat(features.parts)), F.normalize(torch.cat(expected.parts)), rtol=0, atol=close
        )
    finetune = {"protocol": "swav", "percent": 10, "train_batch": 32, "epochs": 2}
    for name, options in (
        ("knn", {}),
        ("linear", {"train_batch": 32, "epochs": 3}),
        ("linear", {"protocol": "byol", "train_batch": 32, "epochs": 2}),
        ("finetune", finetune),
        ("finetune", finetune | {"precision": "bf16"}),
        ("finetune", finetune | {"precision": "fp16"}),
    ):
        row = evaluate(name, run=None, weights=weights_file, train=data[0], val=data[1], world=gpu, options=options)
        assert row["device"] == "cuda" and all(0 <= value <= 100 for value in row["metrics"].values())


def test_neighbors_equal_those_on_the_cpu(monkeypatch):
    monkeypatch.setattr(knn, "BLOCK_BYTES", 4 * 64 * 5000)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(12_000, 64, generator=draw)
    bank = Features(list(torch.cat((rows, rows[:500])).split(1000)), torch.arange(12_500).numpy() % 7)
    query = F.normalize(rows[:300] + torch.randn(300, 64, generator=draw), dim=1)
    for ours, theirs in zip(
        knn.nearest_neighbors(query.cuda(), bank, 20), knn.nearest_neighbors(query, bank, 20), strict=True
    ):
        assert torch.equal(ours.cpu(), theirs)
