"""Cross-modal CMSF: its loss written out, and the limit in which each modality is MSF by itself."""

import pytest
import torch
import torch.nn.functional as F

from hpcssl.errors import ConfigError, DataError
from hpcssl.train import recipe
from hpcssl.train.builders import build_method
from hpcssl.train.data import open_train_shards
from tests.tolerances import of_step

K, K_CONSTRAINT, SIZE = 3, 6, 48
OPTIONS = [f"method.k={K}", f"method.k_constraint={K_CONSTRAINT}"]


def literal(run, batch):
    t = run.training
    images = t.images(batch)
    online, target = t.pair.online, t.pair.target
    with torch.no_grad():
        z = [F.normalize(net.projector(net.backbone(images[v])), dim=1) for net, v in ((target, 1), (target.second, 3))]
    bank = [t.bank.all_rows(column).clone() for column in ("key", "second_modality")]
    for modality in (0, 1):
        at = [(t.bank.pointer + i) % SIZE for i in range(len(z[0]))]
        bank[modality][at] = z[modality]
    total = 0.0
    for modality, net, view in ((0, online, 0), (1, online.second, 2)):
        v = F.normalize(net.predictor(net.projector(net.backbone(images[view]))), dim=1)
        other = 1 - modality
        for i in range(len(v)):
            unconstrained = ((z[modality][i] - bank[modality]) ** 2).sum(1).argsort()[:K]
            allowed = ((z[other][i] - bank[other]) ** 2).sum(1).argsort()[:K_CONSTRAINT]
            constrained = allowed[((z[modality][i] - bank[modality][allowed]) ** 2).sum(1).argsort()[:K]]
            for chosen in (unconstrained, constrained):
                total += ((v[i] - bank[modality][chosen]) ** 2).sum(1).mean() / 2
    for layer in t.norms:
        layer.pending.clear()
    return float(total.detach()) / len(images[0])


def test_the_loss_against_its_formula(small_training):
    run = small_training("digits_cmsf_cross", OPTIONS)
    for step in range(6):
        batch = run.batch(step)
        expected = literal(run, batch)
        assert float(run.step(batch).scalars["loss"]) == pytest.approx(expected, abs=of_step(run.training.step))
    assert not torch.equal(run.training.bank.all_rows("key"), run.training.bank.all_rows("second_modality"))


def test_each_modality_is_msf_if_every_row_is_allowed(small_training):
    cross = small_training("digits_cmsf_cross", ["method.k=5", f"method.k_constraint={SIZE}"])
    msf = small_training("digits_msf", ["method.k=5"])
    for step in range(6):
        cross.step(cross.batch(step))
        msf.step(msf.batch(step))
    cross_parameters = dict(cross.training.pair.online.named_parameters())
    for name, p in msf.training.pair.online.named_parameters():
        torch.testing.assert_close(cross_parameters[name], p, rtol=0, atol=of_step(6))
        assert not torch.equal(cross_parameters[f"second.{name}"], p), "both modalities share an encoder"


def test_the_second_modality_is_embedded_by_the_second_encoder(small_training):
    run = small_training("digits_cmsf_cross", OPTIONS)
    t = run.training
    batch = run.batch(0)
    assert not torch.equal(batch.images[0], batch.images[2])
    before = [p.clone() for p in t.pair.target.second.parameters()]
    run.step(batch)
    assert any(not torch.equal(a, b) for a, b in zip(before, t.pair.target.second.parameters(), strict=True))


def test_shards_of_one_modality_are_refused(make_shards, encode, picture, tmp_path):
    shards = make_shards(tmp_path / "one", [(f"{i}", encode(picture(i)), i % 2) for i in range(4)])
    with pytest.raises(DataError) as caught:
        open_train_shards(recipe.compose("digits_cmsf_cross", [f"data.train={shards.root}"]))
    assert (
        str(shards.root) in caught.value.what + str(caught.value.got) and "--second-modality edges" in caught.value.fix
    )
    assert open_train_shards(recipe.compose("digits_msf", [f"data.train={shards.root}"])).root == shards.root


def test_the_second_modality_has_augmentations_of_its_own():
    values = recipe.compose("digits_cmsf_cross", ["views.second_query=weak"])
    assert [view.augment for view in build_method(values).plan.views] == ["digits", "digits", "weak", "digits"]
    with pytest.raises(ConfigError) as caught:
        build_method(recipe.compose("digits_cmsf_cross", ["views.second_target=week"]))
    assert (caught.value.what, caught.value.got) == ("views.second_target", "'week'") and "weak" in caught.value.fix
