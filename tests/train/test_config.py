"""Configurations: what is accepted and refused, and the round trip through YAML."""

from __future__ import annotations

import pytest

from ragturbo.errors import InvalidRequest
from ragturbo.train.config import OptimConfig, find_config, from_dict, load_config, to_dict, to_yaml

OURS = sorted(path.stem for path in find_config("paper").parent.glob("*.yaml"))
LEAST = {"model": "m", "data": {"sources": [{"path": "d"}]}}


@pytest.mark.parametrize("name", OURS)
def test_our_configurations_load_by_bare_name_and_survive_yaml(name, tmp_path):
    config = load_config(name)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config == from_dict(to_dict(config))


def test_the_papers_configuration_is_the_papers():
    config = load_config("paper")
    assert (config.loop.batch, config.loop.max_steps) == (2048, 20_000)
    assert config.optim.lr == config.discriminator.optim.lr == 1e-5
    assert (config.loss.alpha, config.loss.beta) == (2.5, 1.0)
    assert config.discriminator.spectral_norm and config.student.steps == 1 and config.student.lam is None
    assert config.loop.accumulation(64) * 64 * config.loop.micro_batch == 2048
    synthetic, real = config.data.sources
    assert synthetic.weight / real.weight == 6


def test_a_setting_can_be_changed_on_the_command_line():
    changes = ["loop.batch=64", "student.lora.rank=8", "optim.lr=3e-5", "discriminator.stages=[mid]"]
    config = load_config("paper", [*changes, "student.lam=null"])
    assert (config.loop.batch, config.student.lora.rank, config.optim.lr) == (64, 8, 3e-5)
    assert config.discriminator.stages == ("mid",) and config.student.lam is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["loop.bach=64"], "no setting loop.bach"),
        (["loop.batch"], "write key=value"),
        (["loop.batch=many"], "loop.batch='many' must be int"),
        (["loop.batch=true"], "loop.batch=True must be int"),
        (["loop.batch=2047"], "not a multiple of loop.micro_batch"),
        (["optim.lr=-1"], "optim.lr=-1.0 must be at least 0"),
        (["optim.lr=.inf"], "must be finite"),
        (["optim.decay=linear"], "optim.decay='linear' is not one of 'none', 'cosine'"),
        (["optim.betas=[0.9]"], "must have 2 values"),
        (["student.steps=5"], "between 1 and 4"),
        (["student.adapter=lora"], "'transformer', 'attention', 'none'"),
        (["student.adapter=none", "student.lora.rank=0"], "nothing to train"),
        (["mode=student"], "student.adapter=none"),
        (["mode=student", "student.adapter=none", "student.lora.rank=0", "teacher=self"], "would change with it"),
        (["student=3"], "student must be a group of settings"),
        (["model.name=x"], "model is not a group of settings"),
        (["data.sources=[]"], "data.sources is empty"),
        (["loss.augment=2"], "between 0 and 1"),
        (["loop.ema=1"], "loop.ema=1.0"),
    ],
)
def test_nonsense_is_refused_with_the_setting_and_the_value(changes, message):
    with pytest.raises(InvalidRequest) as error:
        load_config("paper", changes)
    assert message in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InvalidRequest, match="model is not set"):
        from_dict({"data": LEAST["data"]})
    with pytest.raises(InvalidRequest, match="no configuration papers; the built-in ones are: .*paper"):
        load_config("papers")
    (tmp_path / "broken.yaml").write_text("loop: [")
    with pytest.raises(InvalidRequest, match="broken.yaml cannot be read as YAML"):
        load_config(tmp_path / "broken.yaml")


def test_a_batch_divides_into_processes_or_says_so():
    config = from_dict({**LEAST, "loop": {"batch": 12, "micro_batch": 2}})
    assert [config.loop.accumulation(n) for n in (1, 2, 3)] == [6, 3, 2]
    with pytest.raises(InvalidRequest, match=r"batch=12 is not a multiple of .* processes \(4\)"):
        config.loop.accumulation(4)


def test_a_rate_warms_up_and_decays_to_a_fiftieth_where_asked():
    constant, cosine = OptimConfig(lr=1.0, warmup=4), OptimConfig(lr=1.0, warmup=4, decay="cosine")
    assert [constant.rate(i, 100) for i in (0, 3, 4, 99)] == [0.25, 1.0, 1.0, 1.0]
    rates = [cosine.rate(i, 100) for i in range(101)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[52] == pytest.approx(0.51) and rates[100] == 0.02
    assert all(later < sooner for sooner, later in zip(rates[4:], rates[5:], strict=False))
