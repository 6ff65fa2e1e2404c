"""`sluiceway publish`: arguments, files, standard input."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sluiceway import App
from sluiceway.message import Stored
from tests.cli.kit import Shell, environment, eventually

Command = Callable[..., tuple[int, str, str]]


def stored(topic: str, url: str = "sqlite:///sluiceway.db") -> list[Stored]:
    """What rests in a topic."""

    async def read() -> list[Stored]:
        async with App(url) as app:
            return [one async for one in app.transport.browse(topic)]

    return asyncio.run(read())


def test_json_arguments_are_published_in_order(sluiceway: Command) -> None:
    assert sluiceway("publish", "greetings", '"Ada"', '{"n": 1.50}') == (
        0,
        "2 messages published: greetings on sqlite:///sluiceway.db\n",
        "",
    )
    assert [one.body for one in stored("greetings")] == [b'"Ada"', b'{"n": 1.50}']


def test_an_argument_that_is_not_json_is_refused_with_how_to_write_it(sluiceway: Command, here: Path) -> None:
    code, out, errors = sluiceway("publish", "greetings", '"fine"', "Ada")
    assert (code, out) == (2, "")
    assert "the argument 'Ada' is not JSON" in errors
    assert """for a string write '"Ada"', or use --text""" in errors
    code, _, errors = sluiceway("publish", "greetings", "{name:", "Ada}")
    assert "the argument '{name:' is not JSON" in errors
    assert "; write JSON in single quotes, so that the shell leaves its own double quotes" in errors
    assert not (here / "sluiceway.db").exists()


def test_text_arguments_are_strings(sluiceway: Command) -> None:
    assert sluiceway("publish", "greetings", "--text", 'say "hi"', "12")[0] == 0
    assert [one.body for one in stored("greetings")] == [b'"say \\"hi\\""', b'"12"']


def test_key_headers_and_ids_go_with_the_message(sluiceway: Command) -> None:
    code, out, _ = sluiceway("publish", "a", "1", "--key", "k", "--header", "from=test", "--header", "eq=a=b", "--json")
    (message,) = stored("a")
    assert code == 0
    assert json.loads(out) == {"id": message.id, "topic": "a", "key": "k"}
    assert message.key == "k"
    assert dict(message.headers) == {"from": "test", "eq": "a=b"}


def test_lines_of_a_file_are_published_and_blank_ones_skipped(sluiceway: Command, here: Path) -> None:
    (here / "lines.jsonl").write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n\n  \n{"id": "b"}')
    code, out, _ = sluiceway("publish", "a", "--file", "lines.jsonl", "--key-field", "id")
    assert (code, out) == (0, "2 messages published: a on sqlite:///sluiceway.db\n")
    assert [(one.body, one.key) for one in stored("a")] == [(b'{"id": 1}', "1"), (b'{"id": "b"}', "b")]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{nonsense", "line 2501 is not JSON"),
        ("[1]", "line 2501 is no JSON object, so it has no field 'id'"),
        ('{"di": 1}', "line 2501 has no field 'id'; its fields: di"),
        ('{"id": true}', "line 2501: the key field 'id' must be a string or a number, got 'true'"),
    ],
)
def test_a_bad_line_is_named_and_what_went_before_is_said(sluiceway: Command, here: Path, line: str, text: str) -> None:
    (here / "lines").write_text('{"id": 1}\n' * 2500 + line + '\n{"id": 2}\n')
    code, out, errors = sluiceway("publish", "a", "-f", "lines", "--key-field", "id")
    assert (code, out) == (2, "")
    assert text in errors
    assert "2,500 messages published before that, and nothing after" in errors
    assert len(stored("a")) == 2500


def test_a_line_over_the_brokers_limit_is_refused_before_it_is_read_whole(sluiceway: Command, here: Path) -> None:
    (here / "lines").write_text("1\n" + "9" * 200_000)
    code, _, errors = sluiceway("publish", "a", "-f", "lines", "--url", "sqlite:///s.db?max_payload=1000")
    assert code == 2
    assert "line 2 is longer than the broker's limit of 1,000 bytes" in errors
    assert [one.body for one in stored("a", "sqlite:///s.db")] == [b"1"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["a", "1", "--key", "x", "--key-field", "y"], "give --key or --key-field, not both"),
        (["a", "1", "--file", "x"], "give payloads as arguments or a --file, not both"),
        (["a", "--file", "missing"], "missing: No such file or directory"),
        (["a", "1", "--header", "x"], "--header takes name=value, got 'x'"),
        (["a.*", "1"], "is a pattern"),
        (["a b", "1"], "topic 'a b' has the word 'a b'"),
        (["a", "1", "--delay", "-1"], "delay must be 0 or more seconds"),
        (["a", "1", "--url", "sqlit:///x"], "there is no transport for 'sqlit:///x'"),
        (["a", "1", "--url", "memory://"], "memory:// lives inside one process"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_published(
    sluiceway: Command, here: Path, arguments: list[str], text: str
) -> None:
    code, out, errors = sluiceway("publish", *arguments)
    assert (code, out) == (2, "")
    assert text in errors
    assert not (here / "sluiceway.db").exists()


def test_a_broker_that_cannot_be_opened_ends_with_3(sluiceway: Command, here: Path) -> None:
    (here / "sluiceway.db").write_text("this is no database, it is a letter to a friend of mine" * 100)
    code, out, errors = sluiceway("publish", "a", "1")
    assert (code, out) == (3, "")
    assert errors.startswith("Error: ")
    assert len(errors.splitlines()) == 1


def test_piped_lines_are_published_as_they_come_and_ctrl_c_says_how_many(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sluiceway", "publish", "a", "--json"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, bufsize=0,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b'1\n"half a li')
        assert json.loads(process.stdout.readline())["topic"] == "a"  # published, though the pipe is open
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read().decode()
        assert process.wait(20) == 130
    assert "1 message published, perhaps a batch more: a on" in errors
    assert "Traceback" not in errors


def test_nobody_reading_the_output_ends_quietly(shell: Shell) -> None:
    script = f"seq 1 20000 | {sys.executable} -m sluiceway publish a --json | head -1; echo ${{PIPESTATUS[1]}}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=shell.folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[1:] == ["141"], done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_delay_keeps_messages_back(sluiceway: Command, here: Path) -> None:
    (here / "app.py").write_text(
        "from sluiceway import App\napp = App()\n@app.consumer('a')\nasync def a(message): ...\n"
    )
    shell = Shell(here)
    shell("run", "--until-empty")
    assert sluiceway("publish", "a", "1", "--delay", "0.3")[0] == 0
    eventually(lambda: bool(stored("a")), "the message is at rest")
    assert "1 message handled in" in shell("run", "--until-empty").stderr
