from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from pydantic import Field

from cvmk.config import TrainConfig, serve
from cvmk.config.loading import check_values, explain_config, load_config, load_train_config
from cvmk.config.model import LETTERS, Mixer
from cvmk.config.optimizer import OPTIMIZERS
from cvmk.config.search import SearchDocument
from cvmk.config.section import Document, Section, walk
from cvmk.errors import ConfigError, DataError
from cvmk.nn import MIXERS

EXAMPLES = sorted(path for path in (Path(__file__).parents[2] / "examples").rglob("*.toml") if not path.name.startswith("serve"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text('[data]\nembedded = "phrasebook"\n' + text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(path: Path) -> None:
    schema = {"serve.toml": serve.ServeConfig, "search.toml": SearchDocument}.get(path.name, TrainConfig)
    assert isinstance(load_config(schema, path), schema)


def test_values_arrive(tmp_path: Path) -> None:
    path = write(tmp_path, "[distillation]\nlayer_map = [[0, 1], [1, 3]]\n[teacher.model]\nheads = 2\n[optimizer]\nlearning_rate = 1\n")
    config = load_train_config(path)
    assert config.distillation.layer_map == [(0, 1), (1, 3)]
    assert config.teacher is not None and config.teacher.model.heads == 2
    assert config.optimizer.learning_rate == 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[training]\niteratons = 5\n", ["unknown key training.iteratons", "did you mean training.iterations?"]),
        ("[training]\nlearning_rate = 5\n", ["unknown key training.learning_rate", "did you mean optimizer.learning_rate?"]),
        ("[trainig]\n", ["unknown key trainig", "did you mean training?"]),
        ("[teacher.model]\nhedas = 4\n", ["unknown key teacher.model.hedas", "teacher.model.heads?"]),
        ("[training]\nmax_tokens = 'many'\n", ["training.max_tokens", '"many"', "integer"]),
        ("[training]\nmax_tokens = 4096.5\n", ["training.max_tokens", "integer"]),
        ("[training]\nmax_tokens = -4\n", ["training.max_tokens = -4", "greater"]),
        ("[model]\nbias = 'yes'\n", ["model.bias", "boolean"]),
        ("[model]\nheads = 3\n", ["model", "heads (3) must divide d_model (256)"]),
        ("[model]\nencoder_mixers = ['atention']\n", ["model.encoder_mixers.0", "'attention'"]),
        ("[model]\nencoder_mixers = 'SXA?'\n", ["model.encoder_mixers", "'SXA?' has the letters '?', 'X'", "A attention, H hyena, M mamba, 2 mamba2, "]),
        ("[model]\ndecoder_mixers = 'ssru'\n", ["model.decoder_mixers", "letters of mixers are A attention", "names stand in a list"]),
        ("[model]\ndecoder_mixers = ''\n", ["model.decoder_mixers", "'' has no letter"]),
        ("[teacher.model]\nencoder_mixers = 'B'\n", ["teacher.model.encoder_mixers", "'B' has the letter 'B'"]),
        ("[run]\nseed = 2026-01-01\n", ["run.seed", "integer"]),
        ("phrasebook_pairs = 5\ntrain = { source = 'a' }\n", ["data.train", "source and target"]),
        ("max_tokens_per_sentence = 512\n", ["data.max_tokens_per_sentence (512)", "model.max_length (512)"]),
        ("[schedule]\nkind = 'cosin'\n", ["schedule.kind", "did you mean 'cosine'?"]),
        ("[schedule]\nkind = 'wsd'\n", ["schedule.kind", "did you mean 'warmup_stable_decay'?"]),
        ("[optimizer]\nname = 'AdamW'\n", ["optimizer.name", "did you mean 'adamw'?"]),
        ("[optimizer]\nname = 'schedule-free'\n", ["optimizer.name", "did you mean 'schedule_free_adamw'?"]),
        ("[optimizer]\nname = 'sam'\nbase = 'asam'\n", ["optimizer.base = \"asam\"", "'muon'"]),
        ("[optimizer]\nrho = 0.1\n", ["optimizer: rho is a key of the optimisers sam and asam, not of adamw: leave it out, or change name"]),
        ("[optimizer]\nname = 'lion'\neps = 1e-8\n", ["optimizer: eps is a key of the optimisers adamw, muon and schedule_free_adamw, not of lion"]),
        (
            "[teacher.optimizer]\nname = 'sam'\nmomentum = 0.9\n",
            ["teacher.optimizer: momentum is a key of the optimiser muon, not of sam over adamw: leave it out, or change name or base"],
        ),
        ("[optimizer]\nname = 'schedule_free_adamw'\nbetas = [0, 0.9]\n", ["optimizer: betas = [0, ...]", "above 0"]),
        ("[optimizer]\nname = 'muon'\nbetas = [0.9]\n", ["optimizer.betas.1 is missing"]),
        ("[optimizer]\nbetas = [0.9, 1]\n", ["optimizer.betas.1 = 1", "less than 1"]),
        ("[schedule]\ndecay = 0.1\n", ["schedule: decay is a key of the schedule warmup_stable_decay, not of inverse_sqrt"]),
        ("[optimizer]\nname = 'schedule_free_adamw'\n[schedule]\nkind = 'cosine'\n", ["schedule.kind = \"cosine\"", "leave schedule.kind out"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_train_config(write(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message and "config.toml" in message
    for word in words:
        assert word in message


def test_an_optimiser_has_its_own_keys_and_defaults(tmp_path: Path) -> None:
    """The whole of a configuration is one, too; `final_factor` has always been taken by schedules that do not read it."""
    for name, wanted in (
        ("lion", {"learning_rate": 2e-4, "betas": (0.9, 0.99)}),
        ("sam", {"base": "adamw", "rho": 0.05, "eps": 1e-9}),
        ("muon", {"momentum": 0.95, "adamw_learning_rate": None}),
    ):
        config = load_train_config(write(tmp_path, f"[optimizer]\nname = '{name}'\n"))
        assert {key: getattr(config.optimizer, key) for key in wanted} == wanted
        assert check_values(TrainConfig, json.loads(config.model_dump_json()), "itself") == config
        given = {key for key, value in config.optimizer.model_dump().items() if value is not None}
        assert given <= {"name", *OPTIMIZERS.options[name], *OPTIMIZERS.options["adamw"]}
    over = load_train_config(write(tmp_path, "[optimizer]\nname = 'asam'\nbase = 'lion'\nlearning_rate = 1\n"))
    assert (over.optimizer.learning_rate, over.optimizer.weight_decay, over.optimizer.eps, over.optimizer.stepper) == (1.0, 0.05, None, "lion")
    assert load_train_config(write(tmp_path, "[schedule]\nfinal_factor = 0.1\n")).schedule.final_factor == 0.1
    free = "[optimizer]\nname = 'schedule_free_adamw'\n"
    for more, warmup in (("", 1000), ("[schedule]\nwarmup = 7\n", 7), ("[schedule]\nkind = 'constant'\nwarmup = 8\n", 8)):
        schedule = load_train_config(write(tmp_path, free + more)).schedule
        assert (schedule.kind, schedule.warmup) == ("constant", warmup)


def test_letters_of_mixers_are_their_names(tmp_path: Path) -> None:
    short = load_train_config(write(tmp_path, "[model]\nencoder_mixers = 'SSA'\ndecoder_mixers = 'S'\n"))
    long = load_train_config(write(tmp_path, "[model]\nencoder_mixers = ['ssru', 'ssru', 'attention']\ndecoder_mixers = ['ssru']\n"))
    assert short == long and short.model.model_dump(mode="json")["encoder_mixers"] == ["ssru", "ssru", "attention"]
    assert load_train_config(write(tmp_path, ""), ["model.decoder_mixers=SA"]).model.decoder_mixers == ["ssru", "attention"]
    assert {*LETTERS.values()} == {*get_args(Mixer)} == {*MIXERS}


def test_data_is_required(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[run]\nseed = 2\n")
    with pytest.raises(ConfigError, match="data is missing"):
        load_train_config(path)
    path.write_text("[data]\nsource_language = 'en'\n")
    with pytest.raises(ConfigError, match=r"data\.train and data\.valid"):
        load_train_config(path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.toml"):
        load_train_config(tmp_path / "nowhere.toml")
    with pytest.raises(DataError):
        load_train_config(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_bytes(b"[data\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_train_config(broken)
    broken.write_bytes(b"a = '\xff'\n")
    with pytest.raises(DataError, match=r"broken\.toml is not valid UTF-8"):
        load_train_config(broken)
    broken.write_bytes(b"")
    with pytest.raises(ConfigError, match="empty"):
        load_train_config(broken)


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "[training]\niterations = 5\n")
    config = load_train_config(path, ["training.iterations=7", "run.folder=runs/other", "model.bias=false", "teacher.model.heads=2"])
    assert config.training.iterations == 7
    assert config.run.folder == "runs/other"
    assert config.model.bias is False
    assert config.teacher is not None and config.teacher.model.heads == 2
    for wrong in ("training.iterations", "=5", "training..x=1"):
        with pytest.raises(ConfigError, match="section.key=value"):
            load_train_config(path, [wrong])
    with pytest.raises(ConfigError, match="not a table"):
        load_train_config(path, ["training.iterations.x=1"])
    with pytest.raises(ConfigError, match="unknown key training.iteration"):
        load_train_config(path, ["training.iteration=1"])


def test_every_key_is_explained_once() -> None:
    text = explain_config()
    tomllib.loads(text)  # what it prints is TOML
    for name, field, table in walk(TrainConfig):
        assert field.description, f"{name} has no description"
        if table is None and not name.startswith("teacher."):
            assert text.count(field.description) >= 1
    parsed = tomllib.loads(text)
    assert parsed["training"]["iterations"] == 10000
    assert parsed["validation"]["validate_every"] == 1000


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.learning_rate=inf", "optimizer.learning_rate"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate"),
        ("optimizer.betas=[2.0, 0.9]", "optimizer.betas"),
        ("run.seed=100000000000000000000000", "run.seed"),
        ("run.threads=1000000000", "run.threads"),
        ("model.d_model=10000000000", "model.d_model"),
        ("model.max_length=10000000000", "model.max_length"),
    ],
)
def test_numbers_that_no_run_survives(tmp_path: Path, override: str, key: str) -> None:
    path = write(tmp_path, "")
    with pytest.raises(ConfigError, match=re.escape(key)):
        load_train_config(path, [override])


def test_a_validation_or_warmup_beyond_the_end_is_legal(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    config = load_train_config(path, ["training.iterations=10", "validation.validate_every=1000", "schedule.warmup=1000"])
    assert config.validation.validate_every == 1000


def test_explanation_begins_with_the_run_and_its_data() -> None:
    sections = [line for line in explain_config().splitlines() if line.startswith("[")]
    assert [name for name in sections if "." not in name][:4] == ["[run]", "[data]", "[tokenizer]", "[model]"]


class Server(Section):
    port: int = Field(50051, ge=1, description="Port.")


class ServeConfig(Document):
    COMMAND = "cvmk serve"
    FIRST = ("server",)

    level: int = Field(3, description="A key outside of all tables.")
    limits: Server | None = Field(None, description="The limits.")
    server: Server = Field(Server(), description="The server.")


def test_any_schema_is_read_by_the_same_code(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("level = 4\n[server]\nport = 80\n")
    loaded = load_config(ServeConfig, path, ["server.port=81"])
    assert (loaded.level, loaded.server.port) == (4, 81)
    for text, message in (
        ("[server]\nprot = 1", "unknown key server.prot; did you mean server.port?"),
        ("[servers]\nport = 1", "unknown key servers; did you mean server?"),
        ("port = 1", "unknown key port; did you mean limits.port?"),
        ("", "`cvmk serve --explain-config`"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_config(ServeConfig, path)
    lines = explain_config(ServeConfig).splitlines()
    assert lines[0].startswith("# Every key of `cvmk serve CONFIG.toml`")
    assert tomllib.loads("\n".join(lines)) == {"level": 3, "server": {"port": 50051}, "limits": {"port": 50051}}
    assert lines.index("[server]") < lines.index("[limits]")
