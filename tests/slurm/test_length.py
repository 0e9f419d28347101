"""The length of a run as ``hpcssl-submit status`` reports it, from the recipe and the index of the shards."""

import json

from hpcssl import config
from hpcssl.run_dir import RunDir
from hpcssl.train import recipe
from slurm.manage import status


def test_lengths_in_epochs_count_whole_batches_or_images(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/index.json").write_text(json.dumps({"shards": [{"samples": 90}, {"samples": 12}]}))
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    lengths = {"schedule.epochs=7": 7 * 10, "schedule.fractional_epochs=true": 7 * 102 // 10}
    overrides = [f"data.train={tmp_path / 'train'}", "optim.batch=10", "bank.size=64"]
    for override, steps in lengths.items():
        overrides.append(override)
        run.config.write_text(config.to_yaml(recipe.compose("digits_msf", overrides)))
        assert status.total_steps(run) == steps
