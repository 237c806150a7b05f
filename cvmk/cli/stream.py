"""`cvmk stream`: a text that is being written, and its translation beside it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from cvmk.cli._arguments import number
from cvmk.cli._streams import need_open
from cvmk.errors import ConfigError

if TYPE_CHECKING:
    from cvmk.streaming import Policy

HELP = "Translate a text while it is written, by a server or by a model here."
SERVER, POLICY = "127.0.0.1:50051", "retranslation"
"""Where `cvmk serve` listens by default, and what it does."""
_POLICY_OPTIONS = {"retranslation": ("mask",), "local-agreement": ("agreeing", "mask"), "wait-k": ("k",)}
_SERVER_OPTIONS = ("server", "target", "model", "token_file", "tls", "authority", "certificate", "private_key", "server_name", "priority")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Type or pipe a text and watch it being translated. On a terminal, what is committed is plain and what may still change is dim; "
    parser.description += "elsewhere the output is finished sentences, one a line. Sentences end where the text says so, and at the end of a line."
    where = parser.add_argument_group("who translates")
    where.add_argument("--server", metavar="HOST:PORT[,...]", help=f"the server, or replicas of it (default {SERVER}); `cvmk serve` starts one")
    where.add_argument("--model-folder", metavar="FOLDER", help="no server: the model in this folder, in this process")
    where.add_argument("--source", default="auto", metavar="LANGUAGE", help="of the text (default auto: as the server finds)")
    where.add_argument("--target", metavar="LANGUAGE", help="of the translation (may be left out where the server has one)")
    where.add_argument("--model", metavar="NAME", help="one of the server's models (default: any that translates so)")
    how = parser.add_argument_group("how")
    how.add_argument("--policy", choices=tuple(_POLICY_OPTIONS), default=POLICY, help=f"when it says what (default {POLICY})")
    how.add_argument("--mask", type=int, metavar="N", help="last words that are not shown, of retranslation (default 2) and local-agreement (default 0)")
    how.add_argument("--agreeing", type=int, metavar="N", help="translations that must begin alike, of local-agreement (default 2)")
    how.add_argument("--k", type=int, metavar="N", help="words that are read before the first is said, of wait-k (default 3)")
    how.add_argument("--beam-size", type=int, default=0, metavar="N", help="hypotheses a sentence (default 0: the server's own; 1 with --model-folder)")
    how.add_argument("--partial-words", action="store_true", help="translate a last word that no space follows, too")
    how.add_argument("--priority", choices=("low", "normal", "high"), help="of this text among others' at the server (default normal)")
    text = parser.add_argument_group("the text")
    text.add_argument("--file", metavar="FILE", help="a text, plain or compressed, that is written word by word; - is standard input")
    text.add_argument("--wpm", type=number, metavar="N", help="words a minute of --file (default 150; 0: as fast as possible)")
    text.add_argument("--json", action="store_true", help="print every update, one JSON object a line")
    safe = parser.add_argument_group("who asks")
    safe.add_argument("--token-file", metavar="FILE", help="file with the bearer token that the server asks for")
    safe.add_argument("--tls", action="store_true", help="encrypt, and trust what this machine trusts; --authority and --certificate do so, too")
    safe.add_argument("--authority", metavar="FILE", help="certificates (PEM) of which one has signed the server's")
    safe.add_argument("--certificate", metavar="FILE", help="own certificate (PEM), where the server asks for one")
    safe.add_argument("--private-key", metavar="FILE", help="its private key (PEM)")
    safe.add_argument("--server-name", metavar="NAME", help="the name in the server's certificate, where it is not that of --server")


def run(arguments: argparse.Namespace) -> int:
    need_open(sys.stdout, "output")
    policy = _policy(arguments)
    _check(arguments)
    from cvmk.cli._live import follow  # asyncio takes a while to import

    follow(arguments, policy)
    return 0


def _policy(arguments: argparse.Namespace) -> Policy:
    from cvmk.streaming import LocalAgreement, Retranslation, WaitK

    kinds: dict[str, Callable[..., Policy]] = {"retranslation": Retranslation, "local-agreement": LocalAgreement, "wait-k": WaitK}
    given = {name: getattr(arguments, name) for name in ("mask", "agreeing", "k") if getattr(arguments, name) is not None}
    for name in given:
        if name not in _POLICY_OPTIONS[arguments.policy]:
            raise ConfigError(f"--{name} is no option of the policy {arguments.policy}: it belongs to {_owners(name)}")
    return kinds[arguments.policy](**given)


def _owners(option: str) -> str:
    return " and ".join(f"--policy {policy}" for policy, options in _POLICY_OPTIONS.items() if option in options)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.wpm is not None and arguments.file is None:
        raise ConfigError("--wpm is the pace of a file: give --file FILE")
    if arguments.wpm is not None and arguments.wpm < 0:
        raise ConfigError(f"--wpm is {arguments.wpm:g}, and must be 0 or more")
    if not 0 <= arguments.beam_size < 2**31:
        raise ConfigError(f"--beam-size is {arguments.beam_size}, and must be 0 or more")
    if arguments.model_folder is not None:
        for name in _SERVER_OPTIONS:
            if getattr(arguments, name):
                raise ConfigError(f"--{name.replace('_', '-')} is for a server, and --model-folder asks none: leave one of them out")
