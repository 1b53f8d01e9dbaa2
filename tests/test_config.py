"""The configuration: what it accepts, and one line for each thing it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddil_dist.config import (
    DynamicThresholding,
    PriorConfig,
    PriorPart,
    ReflectThresholding,
    RunConfig,
    StaticThresholding,
    dump_config,
    load_config,
    parse_config,
)
from ddil_dist.config.student import Spacing
from ddil_dist.errors import ConfigError
from ddil_dist.launch.prepare import prepared_run
from ddil_dist.methods import GridPlan

DATA_ONLY = "prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]"


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


def test_with_nothing_it_is_the_embedded_default() -> None:
    assert load_config() == RunConfig()
    assert RunConfig().teacher.pipeline == RunConfig().data.path == "builtin"
    assert RunConfig().grid.substeps == 8


@pytest.mark.parametrize("key", ["rollout.compile", "learner.compile", "learner.mixed_precision"])
def test_a_bare_no_is_no(key: str) -> None:
    section, name = key.split(".")
    assert getattr(getattr(load_config(None, [f"{key}=no"]), section), name) == "no"
    with pytest.raises(ConfigError, match=rf"{key}: Input should be 'no'"):
        load_config(None, [f"{key}=yes"])


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("learner:\n  updates: 100\n  batch_size: 32\nrun: {name: from-file}\n")
    config = load_config(file, ["learner.updates=7", "thresholding={type: static, limit: [1, 2.5]}"])
    assert (config.learner.updates, config.learner.batch_size, config.run.name) == (7, 32, "from-file")
    assert config.thresholding == StaticThresholding(limit=(1.0, 2.5))
    assert config.run.path == Path("runs/from-file")


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing yet\n")
    assert load_config(tmp_path / "c.yaml") == RunConfig()


REFUSALS: dict[str, tuple[list[str], str]] = {
    "unknown section": (["learnr.updates=3"], "learnr: unknown key (value {'updates': 3}); did you mean learner?"),
    "guidance that was never trained": (
        ["teacher.guidance={min: 6, max: 16}", "evaluation.guidance_scale=1.5"],
        "evaluation.guidance_scale: 1.5 is outside teacher.guidance, 6 to 16, which is all that the student is trained "
        "for; choose one within, set it to null, or widen teacher.guidance",
    ),
    "unknown key": (["learner.updtes=3"], "learner.updtes: unknown key (value 3); did you mean learner.updates?"),
    "deep unknown key": (
        ["learner.optimizer.warmup=3"],
        "learner.optimizer.warmup: unknown key (value 3); did you mean learner.optimizer.warmup_updates?",
    ),
    "nothing near": (
        ["teacher.guidance.xyzzy=3"],
        "teacher.guidance.xyzzy: unknown key (value 3); valid there: max, min",
    ),
    "a key named like a union's member": (
        ["static=1"],
        "static: unknown key (value 1); valid there: curriculum, data, deadlines, eval",
    ),
    "out of range": (["rollout.actors=-1"], "rollout.actors: Input should be greater than or equal to 0 (got -1)"),
    "wrong type": (["learner.updates=many"], "learner.updates: Input should be a valid integer"),
    "not a choice": (
        ["student.spacing=even"],
        "student.spacing: Input should be 'linspace', 'trailing' or 'leading' (got 'even')",
    ),
    "too few timesteps": (
        ["student.timesteps=[999, 500]"],
        "student.timesteps: 2 of them for steps = 4; give as many, or set student.steps=2",
    ),
    "timesteps that rise": (
        ["student.timesteps=[999, 500, 500, 1]"],
        "student.timesteps: [999, 500, 500, 1] must fall strictly, from noise to image",
    ),
    "timesteps of a consistency student": (
        ["objective.type=consistency", "student.timesteps=[999, 749, 499, 249]"],
        "student.timesteps: a consistency student stops at points of its solver's grid",
    ),
    "infinite": (["redis.connect_timeout_s=.inf"], "redis.connect_timeout_s: Input should be a finite number"),
    "bad name": (["run.name=a/b"], "run.name: must be 1 to 64 letters, digits"),
    "shares": (
        ["prior.parts=[{until: 1, forward: 0.5, student: 0.2, teacher: 0.1}]"],
        "prior.parts.0: forward + student + teacher = 0.5 + 0.2 + 0.1 = 0.8; they are shares of one whole and must",
    ),
    "unknown objective": (
        ["objective.type=progresive"],
        "objective.type: unknown type 'progresive'; did you mean progressive?",
    ),
    "misspelt key of an objective": (
        ["objective={type: consistency, target_decai: 0.9}"],
        "objective.target_decai: unknown key (value 0.9); did you mean objective.target_decay?",
    ),
    "misspelt key of the discriminator": (
        ["objective={type: distribution_matching, gan: {critic_wait: 1}}"],
        "objective.gan.critic_wait: unknown key (value 1); did you mean objective.gan.critic_weight?",
    ),
    "consistency with mixed rollouts": (
        ["objective.type=consistency"],
        "prior.parts: 'consistency' has no mixed rollouts, as the teacher was never trained for consistency; set",
    ),
    "a sharded consistency target": (
        ["objective={type: consistency}", "learner.sharding=fsdp"],
        "learner.sharding: 'fsdp' cannot share the consistency target's moving average among workers; set",
    ),
    "an adapter that is shared": (
        ["student.lora={rank: 4, alpha: 4}", "learner.sharding=fsdp"],
        "learner.sharding: 'fsdp' cannot share an adapter (student.lora)",
    ),
    "more sampler steps than solver steps": (
        ["objective={type: consistency, solver_steps: 4, sampler_steps: [5]}"],
        "objective: sampler_steps: 5 exceeds solver_steps (4)",
    ),
    "a consistency student of more steps than its solver": (
        ["objective={type: consistency, solver_steps: 10}", "student.steps=16"],
        "student.steps: 16 exceeds objective.solver_steps (10)",
    ),
    "no sampler steps": (
        ["objective={type: consistency, sampler_steps: []}"],
        "objective.sampler_steps: Tuple should have at least 1 item",
    ),
    "velocity in fewer steps": (
        ["objective.type=velocity"],
        "student.steps: 4 is not teacher.steps (32); 'velocity' keeps the teacher's steps: set student.steps=32, and",
    ),
    "guidance in fewer steps": (
        ["objective.type=guidance"],
        "student.steps: 4 is not teacher.steps (32); 'guidance' keeps the teacher's steps",
    ),
    "dmd in many steps": (
        ["objective.type=dmd"],
        "student.steps: 'dmd' distils into one step, not 4; set student.steps=1, or objective.type=distribution_match",
    ),
    "labels for distribution matching": (
        ["objective.type=distribution_matching"],
        "rollout.labels: 'distribution_matching' has no labels that actors could make: it judges the "
        "student's newest samples, at the learner; set rollout.labels=learner",
    ),
    "rollouts that nothing would look at": (
        ["objective.type=distribution_matching", "rollout.labels=learner"],
        "objective.generator_input: 'backward_simulation' makes its own inputs and would never look at the rollouts",
    ),
    "a critic that never learns": (
        ["objective={type: distribution_matching, generator_every: 1, critic: alternating}"],
        "objective: critic: 'alternating' with generator_every = 1 would never train the critic; raise it",
    ),
    "dmd's critic that never learns": (
        ["objective={type: dmd, critic: alternating}", "student.steps=1"],
        "objective: critic: 'alternating' would never train it",
    ),
    "noise levels upside down": (
        ["objective={type: distribution_matching, min_timestep: 0.98, max_timestep: 0.02}"],
        "objective: min_timestep (0.98) must be under max_timestep (0.02)",
    ),
    "misspelt key of a part": (
        ["prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0, foward: 1}]"],
        "prior.parts.0.foward: unknown key (value 1); did you mean prior.parts.0.forward?",
    ),
    "parts that end early": (
        ["prior.parts=[{until: 0.5, forward: 1, student: 0, teacher: 0}]"],
        "prior: 'until' of the parts is [0.5]; it must rise strictly and end at 1.0",
    ),
    "no parts": (["prior.parts=[]"], "prior: 'until' of the parts is []; it must rise"),
    "steps that do not divide": (
        ["teacher.steps=30"],
        "teacher.steps: 30 is not a multiple of student.steps (4); one student step equals a whole number of teacher "
        "steps: choose 32",
    ),
    "more teacher steps than a grid has": (["teacher.steps=1000"], "teacher.steps: Input should be less than or equal"),
    "a fleet that is ended before its actors": (
        ["deadlines.actor_stop_s=60"],
        "deadlines: fleet_drain_s (40) must be longer than actor_stop_s (60): the fleet would be ended before",
    ),
    "guidance upside down": (
        ["teacher.guidance.min=9", "teacher.guidance.max=3"],
        "teacher.guidance: min (9.0) must not exceed max (3.0)",
    ),
    "batch among workers": (
        ["learner.batch_size=10", "learner.workers=4"],
        "learner.batch_size: 10 states do not divide among learner.workers = 4; choose a multiple",
    ),
    "micro-batch": (
        ["learner.batch_size=12", "learner.workers=2", "learner.micro_batch_size=4"],
        "learner.micro_batch_size: 4 does not divide the 6 states of a worker's share",
    ),
    "min_size over capacity": (
        ["replay.min_size=300", "replay.capacity=200"],
        "replay.min_size: 300 exceeds replay.capacity (200): no sample could ever be taken; lower min_size",
    ),
    "error buffer": (["replay.error_buffer=10"], "replay.error_buffer: 10 is under two batches (128)"),
    "redis scheme": (["redis.url=http://h:6379"], "redis.url: must begin with redis:// or rediss://, as in redis://"),
    "second redis without a first": (["redis.more_urls=[redis://b]"], "redis.more_urls: set without url"),
    "unknown type of a union": (
        ["thresholding.type=reflct"],
        "thresholding.type: unknown type 'reflct'; did you mean reflect?",
    ),
    "no type of a union": (
        ["thresholding.limit=1"],
        "thresholding.type: is missing (got {'limit': 1}); say which of none, static, dynamic, reflect",
    ),
    "missing key of a union's member": (
        ["thresholding.type=static"],
        "thresholding.limit: is missing, and has no default",
    ),
    "misspelt key of a union's member": (
        ["thresholding={type: dynamic, limit: 1, quantil: 0.9}"],
        "thresholding.quantil: unknown key (value 0.9); did you mean thresholding.quantile?",
    ),
    "bad number in a union's member": (
        ["thresholding={type: reflect, limit: [1, -1]}"],
        "thresholding.limit.1: Input should be greater than 0 (got -1)",
    ),
    "a custom resource named like a tag": (
        ["rollout.resources={one: -1}"],
        "rollout.resources.one: Input should be greater than 0 (got -1)",
    ),
    "malformed override": (["learner.updates"], "'learner.updates' is not an override; write key=value, such as"),
    "option as override": (["--updates=3"], "'--updates=3' is not an override; write key=value"),
    "broken YAML in a value": (["run.name=[a"], "overrides: not readable as configuration: "),
    "unknown interpolation": (
        ["run.seed=${nope}"],
        "run.seed: ${nope} names no key of the configuration; for an environment variable write ${oc.env:nope}",
    ),
    "section as a value": (["learner=3"], "learner: Input should be a valid dictionary"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_one_line_with_key_value_rule_and_remedy(case: str) -> None:
    overrides, beginning = REFUSALS[case]
    message = refusal(*overrides)
    assert message.startswith(beginning)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("trained", "chosen", "scale"),
    [
        ("{min: 1, max: 8}", "null", 1.5),
        ("{min: 6, max: 16}", "null", 6.0),
        ("{min: 1, max: 1.25}", "null", 1.25),
        ("{min: 8, max: 8}", "null", 8.0),
        ("{min: 6, max: 16}", "7.5", 7.5),
        ("{min: 6, max: 16}", "16", 16.0),
    ],
)
def test_a_student_is_evaluated_at_a_scale_that_it_was_trained_on(trained: str, chosen: str, scale: float) -> None:
    config = load_config(None, [f"teacher.guidance={trained}", f"evaluation.guidance_scale={chosen}"])
    assert config.evaluation_guidance_scale == scale


def test_every_problem_has_a_line_of_its_own() -> None:
    message = refusal("learner.updtes=3", "teacher.steps=0", "thresholding={type: static, limt: 2}")
    keys = [line.split(":")[0] for line in message.splitlines()]
    assert sorted(keys) == ["learner.updtes", "teacher.steps", "thresholding.limit", "thresholding.limt"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--config: no file at .*nope\.yaml$"):
        load_config(tmp_path / "nope.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", r"holds no mapping of sections; begin with a key such as 'run:'"),
        (b"42\n", r"c\.yaml: not readable as configuration"),
        (b"run: [a\n", r"c\.yaml: not readable as configuration"),
        (b"run: {name: \xff}\n", r"c\.yaml: not readable as configuration"),
        (b"run: {name: a}\nrun: {name: b}\n", r"c\.yaml: not readable as configuration"),
        (b"1: 2\n", r"1: "),
        (b"just words\n", r"just words: unknown key"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_a_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [None, 3, [], "run"])
def test_what_is_no_mapping_at_all_is_refused(raw: Any) -> None:
    with pytest.raises(ConfigError):
        parse_config(raw)


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().learner.updates = 3  # type: ignore[misc]


def test_the_part_of_the_prior_that_holds() -> None:
    early = PriorPart(until=0.6, forward=0.5, student=0.1, teacher=0.4)
    late = PriorPart(until=1.0, forward=0.0, student=0.75, teacher=0.25)
    prior = PriorConfig(parts=(early, late))
    assert [prior.at(progress) for progress in (0.0, 0.59, 0.6, 1.0)] == [early, early, late, late]
    assert early.student_probability == pytest.approx(0.2)
    assert late.student_probability == 0.75
    assert PriorPart(until=1, forward=1, student=0, teacher=0).student_probability == 0


@pytest.mark.parametrize(("schedule", "quarter"), [("linear", 0.25), ("cosine", 0.1464466094)])
def test_shares_that_move_from_part_to_part(schedule: Any, quarter: float) -> None:
    early = PriorPart(until=0.2, forward=0.8, student=0.0, teacher=0.2)
    late = PriorPart(until=1.0, forward=0.4, student=0.6, teacher=0.0)
    prior = PriorConfig(parts=(early, late), schedule=schedule)
    assert [prior.at(progress) for progress in (0.0, 0.1)] == [early, early]
    for progress, way in ((0.2, 0.0), (0.4, quarter), (0.6, 0.5), (0.8, 1 - quarter), (1.0, 1.0)):
        part = prior.at(progress)
        shares = (part.forward, part.student, part.teacher)
        assert shares == pytest.approx((0.8 - 0.4 * way, 0.6 * way, 0.2 - 0.2 * way)), progress


CONSISTENT = ["objective.type=consistency", "prior.parts=[{until: 1, forward: 0.5, student: 0.5, teacher: 0}]"]


@pytest.mark.parametrize(
    ("overrides", "grid"),
    [
        ([], (4, "linspace", 8)),
        ([*CONSISTENT, "student.steps=3"], (50, "trailing", 1)),
        (["objective.type=velocity", "student.steps=32"], (32, "linspace", 1)),
        (["objective.type=dmd", "student.steps=1"], (1, "linspace", 32)),
        (
            [
                "objective={type: distribution_matching, generator_input: prior}",
                "rollout.labels=learner",
                "student.spacing=trailing",
            ],
            (4, "trailing", 8),
        ),
    ],
)
def test_the_grid_that_an_objective_trains_on(overrides: list[str], grid: tuple[int, Spacing, int]) -> None:
    config = load_config(None, overrides)
    assert config.grid == GridPlan(*grid)


def test_the_default_priors_are_those_of_the_method() -> None:
    first, second = PriorConfig().parts
    assert (first.forward, second.forward) == (0.5, 0.5)
    assert [first.student_probability, second.student_probability] == pytest.approx([0.2, 0.8])
    assert first.teacher > 0
    assert second.teacher > 0


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,12}", fullmatch=True)
limits = st.one_of(st.floats(0.01, 1e6), st.lists(st.floats(0.01, 100), min_size=1, max_size=4).map(tuple))
thresholdings = st.one_of(
    st.builds(StaticThresholding, limit=limits),
    st.builds(ReflectThresholding, limit=limits),
    st.builds(DynamicThresholding, limit=st.floats(0.01, 10), quantile=st.floats(0.01, 1)),
)
words = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20),
    st.sampled_from(["1e5", "0x1f", "yes", "null", "~", "???", "${a}", r"\${a}", r"a\\${b}", "2020-01-01", "1_0", " "]),
)


@settings(max_examples=80, deadline=None)
@given(
    name=st.one_of(names, st.sampled_from(["1e5", "0x1f", "123", "null", "yes", "1_0", "0b1"])),
    text=words,
    steps=st.integers(1, 60),
    substeps=st.integers(1, 8),
    rate=st.floats(1e-12, 1e3),
    thresholding=thresholdings,
    resources=st.dictionaries(words, st.floats(0.001, 100), max_size=2),
    parts=st.integers(0, 100),
)
def test_a_dump_is_read_back_to_an_equal_configuration(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    text: str,
    steps: int,
    substeps: int,
    rate: float,
    thresholding: Any,
    resources: dict[str, float],
    parts: int,
) -> None:
    config = parse_config(
        {
            "run": {"name": name, "directory": Path("/r")},
            "teacher": {"steps": steps * substeps, "pipeline": text},
            "student": {"steps": steps},
            "data": {"path": text, "text_column": text},
            "thresholding": thresholding.model_dump(),
            "rollout": {"resources": resources},
            "learner": {"optimizer": {"learning_rate": rate}},
            "prior": {"parts": [{"until": 1, "forward": parts / 100, "student": 1 - parts / 100, "teacher": 0}]},
        }
    )
    file = tmp_path_factory.getbasetemp() / "dump.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


def test_the_default_round_trips(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(dump_config(RunConfig()), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == RunConfig()


def test_a_password_in_a_url_is_in_no_repr() -> None:
    config = load_config(None, ["redis.url=redis://:secret@host", "redis.more_urls=[redis://:secret@other]"])
    assert "secret" not in repr(config)


def test_reading_a_configuration_imports_no_torch() -> None:
    code = (
        "import sys, ddil_dist.config as c; c.load_config(None, ['learner.updates=3']); "
        "heavy = {'torch', 'diffusers', 'transformers', 'ray', 'redis', 'accelerate'} & set(sys.modules); "
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_password_in_a_url_is_never_written_or_shown() -> None:
    config = load_config(None, ["redis.url=redis://user:s3cret@host:1", "redis.more_urls=[rediss://:s3cret@b:2/0]"])
    text = dump_config(config)
    assert "s3cret" not in text
    assert "redis://user@host:1" in text
    assert "rediss://b:2/0" in text
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["redis.url=http://user:s3cret@host"])
    assert "s3cret" not in str(caught.value)
    assert "redis.url: must begin with redis:// or rediss://" in str(caught.value)


def test_an_insert_larger_than_the_limiter_ever_admits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"replay.error_buffer: 200 .*insert_batch x .*= 512\): no insert could ever"):
        load_config(None, ["replay.error_buffer=200", "learner.batch_size=64"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.optimizers={fake_score: {}}", r"'fake_score' is no further network .*'progressive'.*remove it"),
        ("learner.optimizers={student: {}}", r"'student' .* the student's is learner\.optimizer$"),
    ],
)
def test_an_optimizer_of_a_network_that_is_not_trained_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize("role", ["fake_score", "fake"])
def test_a_critic_may_have_an_optimizer_of_its_own(role: str) -> None:
    path = Path(__file__).parents[1] / "deploy" / "runs" / "builtin_dmd2.yaml"
    overrides = [f"learner.optimizers={{{role}: {{learning_rate: 0.5}}}}"]
    if role == "fake_score":
        assert load_config(path, overrides).learner.optimizer_of(role).learning_rate == 0.5
    else:
        with pytest.raises(ConfigError, match=r"'fake' is no further network .* name one of \['fake_score'\]"):
            load_config(path, overrides)


def test_a_resumed_run_keeps_its_kind_of_optimizer(tmp_path: Path) -> None:
    common = [f"run.directory={tmp_path}"]
    with prepared_run(load_config(None, common)):
        pass
    with (
        pytest.raises(ConfigError, match=r"learner\.optimizer\.type: the student .* 'adamw', .* 'adamw_fused' cannot"),
        prepared_run(load_config(None, [*common, "learner.optimizer.type=adamw_fused"])),
    ):
        pass
    with prepared_run(load_config(None, [*common, "learner.optimizer.learning_rate=0.1"])):
        pass


def test_an_element_of_a_list_is_set_by_its_number(tmp_path: Path) -> None:
    for key in ("prior.parts[1]", "prior.parts.1"):
        parts = load_config(None, [f"{key}.student=0.3", f"{key}.teacher=0.2"]).prior.parts
        assert (parts[0], parts[1].student) == (PriorConfig().parts[0], 0.3)
    file = tmp_path / "c.yaml"
    file.write_text("prior: {parts: [{until: 1.0, forward: 1, student: 0, teacher: 0}]}\n")
    (part,) = load_config(file, ["prior.parts[0].forward=0.5", "prior.parts[0].student=0.5"]).prior.parts
    assert (part.forward, part.student) == (0.5, 0.5)
    assert load_config(None, ["student.timesteps=[999, 500]", "student.steps=2", "student.timesteps[1]=400"])
    assert refusal("prior.parts[2].student=0.2") == "prior.parts: there is no element 2; it has 2, counted from 0"


def test_an_override_changes_what_it_names() -> None:
    common = ["objective.type=distribution_matching", "rollout.labels=learner", DATA_ONLY]
    student = ["learner.optimizer={max_grad_norm: 10, schedule: constant, learning_rate: 0.1}"]
    config = load_config(None, [*common, *student, "learner.optimizers.fake_score.learning_rate=0.2"])
    fake = config.learner.optimizer_of("fake_score")
    assert (fake.learning_rate, fake.max_grad_norm, fake.schedule) == (0.2, 10, "constant")
    assert config.learner.optimizer.learning_rate == 0.1
    assert parse_config(config.model_dump(mode="json")) == config


def test_an_environment_variable_is_named_as_it_must_be_written() -> None:
    assert "run.directory: ${HOME} names no key" in refusal("run.directory=${HOME}/runs")
    assert "${oc.env:HOME}" in refusal("run.directory=${HOME}/runs")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("learner.workers=4", "learner.workers: 4"),
        ("learner.num_gpus=1", "learner.num_gpus: 1"),
        ("rollout.num_gpus=1", "rollout.num_gpus: 1"),
        ("redis.url=redis://user:secret@host:1", "redis.url: a server"),
    ],
)
def test_one_process_is_asked_for_nothing_that_it_has_not(override: str, key: str) -> None:
    told = refusal("run.execution=inline", override)
    assert told.startswith(f"{key}, but run.execution=inline")
    assert "secret" not in told


def test_a_single_image_is_no_evaluation() -> None:
    assert "evaluation.num_images: 1; metrics compare images" in refusal("evaluation.num_images=1")
