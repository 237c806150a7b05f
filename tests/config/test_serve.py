"""serve.toml: what it takes, and the sentences about what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from cvmk.config.loading import explain_config, parse_config
from cvmk.config.serve import ServeConfig
from cvmk.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve.toml"
MODEL = '[models.en-de]\npath = "runs/run"\n'


def test_the_example_is_valid() -> None:
    assert isinstance(parse_config(ServeConfig, EXAMPLE.read_text(encoding="utf-8"), EXAMPLE.name), ServeConfig)


def test_the_least() -> None:
    config = parse_config(ServeConfig, MODEL + 'source = "EN"\n', "serve.toml")
    assert config.server.host == "127.0.0.1" and config.models["en-de"].source == "en" and config.models["en-de"].target is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[models.a]\npaht = "x"', "models.a.paht; did you mean models.a.path?"),
        ("[models]", "at least one table [models.NAME]"),
        ("[server]\nport = 1", "models is missing"),
        (MODEL + "[server]\nport = -1", "server.port = -1"),
        (MODEL + '[limits]\ncertificate = "x"', "did you mean security.certificate?"),
        (MODEL + "[server]\nadmin_port = 1", "server.admin_port needs security.admin_keys"),
        (MODEL + '[security]\ncertificate = "x"', "certificate and private_key go together"),
        (MODEL + '[security]\nclient_authority = "x"', "client_authority needs certificate"),
        ('[models."a/b"]\npath = "x"', "is no name of a model"),
        ('[models.a]\npath = "x"\ntarget = "germn"', "models.a.target"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(ServeConfig, text, "serve.toml")
    assert said in str(error.value)


def test_tables_with_names_of_the_users_choice_are_explained() -> None:
    said = explain_config(ServeConfig)
    assert "[models.NAME]" in said and "# path =" in said and "[models]\n" not in said
