"""Cross-modal CMSF: its loss written out, and the limit in which each modality is MSF by itself."""

import pytest
import torch
import torch.nn.functional as F

from hpcssl.errors import ConfigError, DataError
from hpcssl.train import recipe
from hpcssl.train.data import open_shards
from hpcssl.train.state import method_of

K, TWINS, SIZE = 3, 6, 48
OPTIONS = [f"method.k={K}", f"method.twins={TWINS}"]


def literal(made, batch):
    t = made.training
    images = t.images(batch)
    online, target = t.pair.online, t.pair.target
    with torch.no_grad():
        z = [F.normalize(net.projector(net.backbone(images[v])), dim=1)
             for net, v in ((target, 1), (target.second, 3))]
    bank = [t.bank.everything(column).clone() for column in ("key", "twin")]
    for modality in (0, 1):
        at = [(t.bank.pointer + i) % SIZE for i in range(len(z[0]))]
        bank[modality][at] = z[modality]
    total = 0.0
    for modality, net, view in ((0, online, 0), (1, online.second, 2)):
        v = F.normalize(net.predictor(net.projector(net.backbone(images[view]))), dim=1)
        other = 1 - modality
        for i in range(len(v)):
            free = ((z[modality][i] - bank[modality]) ** 2).sum(1).argsort()[:K]
            led = ((z[other][i] - bank[other]) ** 2).sum(1).argsort()[:TWINS]
            near = led[((z[modality][i] - bank[modality][led]) ** 2).sum(1).argsort()[:K]]
            for chosen in (free, near):
                total += ((v[i] - bank[modality][chosen]) ** 2).sum(1).mean() / 2
    for layer in t.norms:
        layer.pending.clear()
    return float(total.detach()) / len(images[0])


def test_the_loss_against_its_formula(small_training):
    made = small_training("digits_cmsf_cross", OPTIONS)
    for step in range(6):
        batch = made.batch(step)
        wanted = literal(made, batch)
        assert float(made.step(batch).scalars["loss"]) == pytest.approx(wanted, abs=1e-12)
    assert not torch.equal(made.training.bank.everything("key"), made.training.bank.everything("twin"))


def test_where_every_row_is_allowed_each_modality_is_msf(small_training):
    cross = small_training("digits_cmsf_cross", ["method.k=5", f"method.twins={SIZE}"])
    msf = small_training("digits_msf", ["method.k=5"])
    for step in range(6):
        cross.step(cross.batch(step))
        msf.step(msf.batch(step))
    mine = dict(cross.training.pair.online.named_parameters())
    for name, p in msf.training.pair.online.named_parameters():
        torch.testing.assert_close(mine[name], p, rtol=0, atol=1e-12)
        assert not torch.equal(mine[f"second.{name}"], p), "the second modality has encoders of its own"


def test_the_second_modality_is_embedded_by_the_second_encoder(small_training):
    made = small_training("digits_cmsf_cross", OPTIONS)
    t = made.training
    batch = made.batch(0)
    assert not torch.equal(batch.images[0], batch.images[2])
    before = [p.clone() for p in t.pair.target.second.parameters()]
    made.step(batch)
    assert any(not torch.equal(a, b) for a, b in zip(before, t.pair.target.second.parameters(), strict=True))


def test_shards_of_one_modality_are_refused(make_shards, encode, picture, tmp_path):
    shards = make_shards(tmp_path / "one", [(f"{i}", encode(picture(i)), i % 2) for i in range(4)])
    with pytest.raises(DataError, match=r"without a second modality.*--second edges"):
        open_shards(recipe.compose("digits_cmsf_cross", [f"data.train={shards.root}"]))
    assert open_shards(recipe.compose("digits_msf", [f"data.train={shards.root}"])).root == shards.root


def test_the_second_modality_has_augmentations_of_its_own():
    made = recipe.compose("digits_cmsf_cross", ["views.second_query=weak"])
    assert [view.augment for view in method_of(made).plan.views] == ["digits", "digits", "weak", "digits"]
    with pytest.raises(ConfigError, match=r"views\.second_target.*'week'.*weak"):
        method_of(recipe.compose("digits_cmsf_cross", ["views.second_target=week"]))
