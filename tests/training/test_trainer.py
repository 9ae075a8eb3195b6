"""Training: it learns, it resumes to the same bits after kill -9, and processes equal micro-batches."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_task import cascade, data, recipe

import fastcascade as fc
from fastcascade.errors import DataError, InvalidArgument
from fastcascade.training.refit import collect_logits, fit_selector

HERE = Path(__file__).parents[1] / "helpers"
PREAMBLE = """
import sys
import fastcascade as fc
import torch
from safetensors.torch import save_file
from training_task import cascade, data, recipe
torch.set_num_threads(1)
"""


def start(script: str, directory: Path, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """Run a script in a process of its own, with ``directory`` as its argument."""
    program = directory / "program.py"
    program.write_text(PREAMBLE + textwrap.dedent(script))
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(program), str(directory)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.mark.parametrize("objective", ["exact", "reinforce", "imitation"])
def test_training_learns_and_saves_cost(objective):
    c, train, val, test = cascade(), data(1024, 1), data(512, 2), data(512, 3)
    history = fc.fit(c, train, val, objective=objective, alpha=0.3, recipe=recipe(), progress=False)
    assert [h["phase"] for h in history] == ["pretrain"] * 3 + ["joint"] * 3
    out = c(test[0])
    assert float((out.label == test[1]).float().mean()) > 0.8
    assert float(out.cost_macs.double().mean()) < 0.9 * c.dense_macs
    assert len(c.seen_images) == 1024 + 512


def test_each_phase_is_announced_before_it_runs(tmp_path, capsys):
    held_out = data(64, 2)
    short = recipe(pretrain_epochs=2, joint_epochs=1)
    phases = [
        "pretrain: stages 0, 1, 128 images, epochs 1 to 2, 2 steps each",
        "joint: stages 0, 1 and selector, 128 images, epochs 1 to 1, 2 steps each",
        "temperatures and selector: 64 images, at most 60 steps",
    ]
    images, labels = data(128, 1)
    with pytest.raises(DataError, match="the loss became"):
        fc.fit(cascade(), (images * np.inf, labels), held_out, recipe=short)
    assert capsys.readouterr().err.splitlines()[0] == phases[0]
    fc.fit(cascade(), (images, labels), held_out, recipe=short, checkpoint_dir=tmp_path)
    assert [line for line in capsys.readouterr().err.splitlines() if " images, " in line] == phases
    fc.fit(cascade(), (images, labels), held_out, recipe=short, checkpoint_dir=tmp_path)  # all epochs done
    assert [line for line in capsys.readouterr().err.splitlines() if " images, " in line] == phases[2:]
    fc.fit(cascade(), (images, labels), held_out, recipe=short, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("baseline", ["none", "greedy"])
def test_reinforce_runs_with_each_baseline_and_detached_probabilities(baseline):
    c = cascade()
    plan = recipe(baseline=baseline, detach_probs=True, pretrain_epochs=1, joint_epochs=1)
    fc.fit(c, data(256, 1), data(128, 2), objective="reinforce", recipe=plan, progress=False)
    assert all(p.isfinite().all() for p in c.parameters())


@pytest.mark.parametrize("detach", [True, False])
def test_detached_probabilities_keep_the_policy_gradient_out_of_the_stages(detach):
    """Imitation treats rewards as constants, so without auxiliary loss only the policy can move a stage."""
    c = cascade()
    stages = list(c.stages.parameters())
    before = [p.detach().clone() for p in stages]
    selector = c.selector.w1.detach().clone()
    plan = recipe(detach_probs=detach, auxiliary=0.0, weight_decay=0.0, pretrain_epochs=0, joint_epochs=1)
    fc.fit(
        c,
        data(256, 1),
        data(128, 2),
        objective="imitation",
        recipe=plan,
        refit_selector=False,
        progress=False,
    )
    unchanged = [torch.equal(p, old) for p, old in zip(stages, before, strict=True)]
    scored = len(list(c.stages[0].parameters()))  # the last exit has no score
    assert all(unchanged) if detach else not any(unchanged[:scored])
    assert not torch.equal(c.selector.w1, selector)


def test_distillation_trains_the_last_stage_first_and_leaves_it_alone_afterwards():
    c = cascade()
    plan = recipe(distillation=0.5, pretrain_epochs=1, joint_epochs=0)
    history = fc.fit(c, data(256, 1), data(128, 2), recipe=plan, progress=False)
    assert [h["phase"] for h in history] == ["pretrain last stage", "pretrain earlier stages"]
    alone = cascade()
    one = fc.Cascade([alone.stages[1]], None, 3, (1, 8, 8))
    fc.fit(one, data(256, 1), data(128, 2), recipe=recipe(pretrain_epochs=1, joint_epochs=0), progress=False)
    for a, b in zip(c.stages[1].state_dict().values(), one.stages[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_segments_are_trained_together():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
    stages = [
        fc.Stage(body, nn.Linear(16, 3)),
        fc.Stage(nn.Linear(16, 16), nn.Linear(16, 3), input="previous"),
    ]
    c = fc.Cascade(stages, fc.MLPSelector(), 3, (1, 8, 8))
    fc.fit(c, data(512, 1), data(256, 2), recipe=recipe(distillation=0.3), progress=False)
    x, y = data(256, 3)
    assert float((c(x).label == y).float().mean()) > 0.7


def test_frozen_stages_stay_as_they_are_and_training_images_warn():
    c, train, val = cascade(), data(512, 1), data(256, 2)
    fc.fit(c, train, val, recipe=recipe(), progress=False)
    before = {k: v.clone() for k, v in c.stages.state_dict().items()}
    scores = c.selector.w1.clone()
    fc.fit(c, None, data(256, 4), freeze_stages=True, recipe=recipe(seed=1), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in c.stages.state_dict().items())
    assert not torch.equal(scores, c.selector.w1)
    with pytest.warns(UserWarning, match="trained on these images"):
        fc.fit(c, train, val, freeze_stages=True, recipe=recipe(), progress=False)


def test_the_refit_raises_the_reward_and_needs_no_stages():
    c, (x, y) = cascade(), data(512, 2)
    fc.fit(c, data(512, 1), (x, y), recipe=recipe(joint_epochs=0), refit_selector=False, progress=False)
    earned = fit_selector(c, collect_logits(c, x), y, alpha=0.3, steps=100, start_at_rule=False, folds=0)
    assert earned[-1] > earned[0] + 0.01
    started = fit_selector(c, collect_logits(c, x), y, alpha=0.3, steps=100)
    assert started[-1] > earned[-1] - 0.01  # a rule with the right scale needs few steps, if any
    with pytest.raises(InvalidArgument, match="expected"):
        fit_selector(c, torch.zeros(3, 5, 3), y)


def test_killed_and_resumed_ends_with_the_same_bits(tmp_path):
    """A real kill -9 in mid-run, twice, then the rest."""
    script = """
        c = cascade()
        fc.fit(c, data(2048, 1), data(128, 2), objective="reinforce", checkpoint_dir=sys.argv[1],
               recipe=recipe(distillation=0.5), progress=False)
        save_file(c.state_dict(), sys.argv[1] + "/final.safetensors")
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    finish(start(script, whole))
    metrics = killed / "metrics.jsonl"
    for epochs_before_the_kill in (2, 7):
        process = start(script, killed)
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= epochs_before_the_kill):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (killed / "final.safetensors").exists()
    finish(start(script, killed))
    expected, got = (load_file(directory / "final.safetensors") for directory in (whole, killed))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert metrics.read_text() == (whole / "metrics.jsonl").read_text()


def test_the_selector_minds_the_costs_that_it_is_given():
    """Dear late exits are avoided, free ones are not."""
    shares = []
    for late in (0.0, 100.0):
        c = cascade()
        fc.fit(c, None, data(256, 2), freeze_stages=True, cost_shares=[0.0, late])
        shares.append(fc.evaluate(c, data(256, 2)).exit_shares[0])
    assert shares[1] == 1.0
    assert shares[0] < 1.0


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    arguments = {"checkpoint_dir": tmp_path, "progress": False}
    fc.fit(cascade(), data(128, 1), data(64, 2), recipe=recipe(pretrain_epochs=1), **arguments)
    with pytest.raises(InvalidArgument, match="alpha differ"):
        fc.fit(cascade(), data(128, 1), data(64, 2), alpha=0.9, recipe=recipe(pretrain_epochs=1), **arguments)


@pytest.mark.parametrize("objective", ["exact", "reinforce"])
def test_two_processes_equal_two_micro_batches(tmp_path, objective):
    script = f"""
        import os
        world = int(os.environ.get("WORLD_SIZE", "1"))
        c = cascade()
        fc.fit(c, data(512, 1), data(128, 2), objective="{objective}",
               recipe=recipe(accumulate=2 // world, pretrain_epochs=1, joint_epochs=2), progress=False)
        if os.environ.get("RANK", "0") == "0":
            save_file(c.state_dict(), f"{{sys.argv[1]}}/{{world}}.safetensors")
    """
    finish(start(script, tmp_path))
    finish(start(script, tmp_path, ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")))
    one, two = (load_file(tmp_path / f"{n}.safetensors") for n in (1, 2))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fc.fit(cascade(), None, data(8, 1)), InvalidArgument, "freeze_stages=True"),
        (lambda: fc.fit(cascade(), data(8, 1), None), InvalidArgument, "val is None"),
        (
            lambda: fc.fit(cascade(), data(8, 1), data(8, 1), cost_shares=[1.0]),
            InvalidArgument,
            "one per exit",
        ),
        (
            lambda: fc.fit(cascade(), data(8, 1), (data(8, 1)[0], torch.full((8,), 3))),
            (InvalidArgument, DataError),
            "labels",
        ),
        (
            lambda: fc.fit(cascade(), data(63, 1), data(8, 1), recipe=recipe(accumulate=2)),
            InvalidArgument,
            "split evenly",
        ),
        (
            lambda: fc.fit(
                cascade(),
                (torch.full((64, 1, 8, 8), float("nan")), torch.zeros(64, dtype=torch.long)),
                data(8, 1),
                recipe=recipe(),
                progress=False,
            ),
            DataError,
            "non-finite pixels",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_random_numbers_depend_on_seed_epoch_and_index_only():
    from fastcascade.training.augmentation import crop_and_flip, uniforms

    whole = uniforms(3, 1, np.arange(1000), 3)
    assert np.array_equal(whole[[5, 900]], uniforms(3, 1, np.array([5, 900]), 3))
    assert not np.array_equal(whole, uniforms(3, 2, np.arange(1000), 3))
    assert not np.array_equal(whole, uniforms(4, 1, np.arange(1000), 3))
    assert abs(whole.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(whole.T)[0, 1]) < 0.1
    image = torch.arange(1, 17, dtype=torch.uint8).reshape(1, 1, 4, 4)
    middle = np.array([[0.5, 0.5, 0.9]])
    assert torch.equal(crop_and_flip(image, middle, 1), image)
    assert torch.equal(crop_and_flip(image, np.array([[0.5, 0.5, 0.1]]), 1), image.flip(3))
    shifted = crop_and_flip(image, np.array([[0.0, 0.99, 0.9]]), 1)
    assert torch.equal(shifted[0, 0, 1:, :3], image[0, 0, :3, 1:])
    assert int(shifted[0, 0, 0].sum()) == 0
