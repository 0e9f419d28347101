"""On a GPU: the same features to rounding, and neighbours that are the CPU's to the bit."""

import pytest
import torch
import torch.nn.functional as F

from hpcssl.evals import knn
from hpcssl.evals.features import Encoder, FeatureOptions, Features, extract
from hpcssl.evals.run import evaluate
from hpcssl.world import World

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_features_and_scores_agree_with_the_cpu(data, weights_file):
    gpu, cpu = World.alone("cuda"), World.alone()
    for precision, close in (("fp32", 2e-3), ("bf16", 2e-2)):  # fp32 convolutions may use TF32
        options = FeatureOptions(batch=32, precision=precision)
        found = extract(Encoder.open(weights_file, gpu), data[0], options, gpu)
        expected = extract(Encoder.open(weights_file, cpu), data[0], FeatureOptions(batch=32), cpu)
        torch.testing.assert_close(F.normalize(torch.cat(found.parts)), F.normalize(torch.cat(expected.parts)),
                                   rtol=0, atol=close)
    tuned = {"protocol": "swav", "percent": 10, "train_batch": 32, "epochs": 2}
    for name, options in (("knn", {}), ("linear", {"train_batch": 32, "epochs": 3}),
                          ("linear", {"protocol": "byol", "train_batch": 32, "epochs": 2}), ("finetune", tuned),
                          ("finetune", tuned | {"precision": "bf16"}), ("finetune", tuned | {"precision": "fp16"})):
        row = evaluate(name, run=None, weights=weights_file, train=data[0], val=data[1], world=gpu, options=options)
        assert row["device"] == "cuda" and all(0 <= value <= 100 for value in row["metrics"].values())


def test_neighbours_are_the_cpus(monkeypatch):
    monkeypatch.setattr(knn, "BYTES", 4 * 64 * 5000)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(12_000, 64, generator=draw)
    bank = Features(list(torch.cat((rows, rows[:500])).split(1000)), torch.arange(12_500).numpy() % 7)
    query = F.normalize(rows[:300] + torch.randn(300, 64, generator=draw), dim=1)
    for ours, theirs in zip(knn.nearest(query.cuda(), bank, 20), knn.nearest(query, bank, 20), strict=True):
        assert torch.equal(ours.cpu(), theirs)
