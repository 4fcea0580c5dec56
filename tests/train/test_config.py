"""Configurations: what is accepted and refused, and the round trip through YAML."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragturbo.errors import InvalidRequest
from ragturbo.train.config import OptimConfig, find_config, from_dict, load_config, settle, to_dict, to_yaml

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
    assert settle(config, 64) == config
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
        (["loop.bach=64"], "no setting loop.bach; did you mean loop.batch?"),
        (["batch=64"], "no setting batch; did you mean loop.batch?"),
        (["lr=1"], "did you mean discriminator.optim.lr or optim.lr?"),
        (["loop.xyz=1"], "no setting loop.xyz; known: batch, compile,"),
        (["loop.batch=["], "line 1, column 2: expected the node content"),
        (["data.sources=data/teacher"], "must be a list, such as [{path: FOLDER, weight: 1}]"),
        (["data.sources=[data/teacher]"], "data.sources[0] must be a group of settings, such as {path: FOLDER, "),
        (["data.sources=[{path: a, wieght: 2}]"], "did you mean data.sources[0].weight?"),
        (["loop.max_steps=0"], "loop.max_steps=0 must be at least 1"),
        (["mode=lora"], "the setting mode is 'lora'; it must be 'adapter' or 'student'"),
        (["loop.precision=fp16"], "'fp32', 'bf16'; did you mean 'bf16'?"),
        (["model=3"], "`model=3` must be a text"),
        (["loop.batch"], "write key=value"),
        (["loop.batch=many"], "loop.batch='many' must be a whole number"),
        (["loop.batch=true"], "loop.batch=True must be a whole number"),
        (["loop.batch=2047", "loop.micro_batch=16"], "not a multiple of loop.micro_batch=16: set loop.micro_batch=1,"),
        (["loop.micro_batch=24"], "loop.batch=2048 is not a multiple of loop.micro_batch=24: set loop.micro_batch=16,"),
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


def test_the_micro_batch_settles_by_itself():
    def chosen(processes, **loop):
        return settle(from_dict({**LEAST, "loop": loop}), processes).loop.micro_batch

    assert [chosen(n, batch=64) for n in (1, 2, 4, 8, 16)] == [16, 16, 16, 8, 4]
    assert [chosen(1, batch=batch) for batch in (1, 4, 12, 17, 24, 2048)] == [1, 4, 12, 1, 12, 16]
    # What is set is an upper bound, because the number of processes is not a setting.
    assert [chosen(n, batch=64, micro_batch=32) for n in (1, 2, 4)] == [32, 32, 16]
    with pytest.raises(
        InvalidRequest, match="loop.batch=12 cannot be shared by 5 processes: set it to a multiple of 5"
    ):
        chosen(5, batch=12)


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 8))
def test_a_settled_configuration_stays_as_it_is(share, bound, processes):
    loop = {
        "batch": share * processes,
        "micro_batch": next(d for d in range(min(bound, share), 0, -1) if share % d == 0),
    }
    for config in (from_dict({**LEAST, "loop": {"batch": loop["batch"]}}), from_dict({**LEAST, "loop": loop})):
        once = settle(config, processes)
        assert settle(once, processes) == once and share % once.loop.micro_batch == 0


def test_a_smaller_batch_takes_a_smaller_micro_batch():
    assert load_config("shapes", ["loop.batch=4"]).loop.micro_batch == 4
    assert load_config("shapes", ["loop.batch=96"]).loop.micro_batch == 48
    assert load_config("shapes", ["loop.batch=128"]).loop.micro_batch == 64


def test_a_rate_warms_up_and_decays_to_a_fiftieth_where_asked():
    constant, cosine = OptimConfig(lr=1.0, warmup=4), OptimConfig(lr=1.0, warmup=4, decay="cosine")
    assert [constant.rate(i, 100) for i in (0, 3, 4, 99)] == [0.25, 1.0, 1.0, 1.0]
    rates = [cosine.rate(i, 100) for i in range(101)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[52] == pytest.approx(0.51) and rates[100] == 0.02
    assert all(later < sooner for sooner, later in zip(rates[4:], rates[5:], strict=False))
