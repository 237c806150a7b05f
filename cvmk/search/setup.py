"""A search from its TOML: the training configuration, the table [search], and the space, all checked."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

from cvmk.config.loading import parse_config, parse_train_config
from cvmk.config.overrides import with_overrides, without_table
from cvmk.config.schema import TrainConfig
from cvmk.config.search import SearchConfig, SearchDocument
from cvmk.errors import ConfigError
from cvmk.search.space import Space


@dataclass(frozen=True)
class SearchSetup:
    """`text` is the TOML of the training configuration, `config`, without the table [search]."""

    config: TrainConfig
    search: SearchConfig
    space: Space
    text: str


def parse_search(text: str, name: str, overrides: Sequence[str] = ()) -> SearchSetup:
    """The search that the TOML `text` with `overrides` ("section.key=value") describes; `name` stands in the errors. Raises ConfigError."""
    document = parse_config(SearchDocument, text, name, overrides)
    if document.search is None:
        raise ConfigError(f"{name} has no table [search]: `cvmk search --explain-config` lists its keys")
    text = without_table(with_overrides(text, overrides), "search")
    values = tomllib.loads(text)
    return SearchSetup(parse_train_config(values, name), document.search, Space(document.search.space, values, name), text)
