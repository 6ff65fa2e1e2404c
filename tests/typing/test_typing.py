"""What users write is checked: good code passes strict pyright and mypy, and each mistake is an error on its line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import sluiceway

HERE = Path(__file__).parent
SOURCE = Path(sluiceway.__file__).parent.parent
TOOLS = Path(sys.executable).parent

Found = Mapping[str, Mapping[int, str]]
"""Errors by file name and line: all their texts."""

START = """
from __future__ import annotations
from collections.abc import Sequence
from typing import Any
import msgspec
from sluiceway import App, Batch, Batching, Consumer, FunctionConsumer, Message, Retry, RetryLater, consumer
class Payment(msgspec.Struct):
    id: str
    cents: int
class Entry(msgspec.Struct):
    currency: str
app = App("memory://")
@app.consumer("good")
async def payments(message: Message[Payment], ledger: str) -> Entry: ...
"""

# Per mistake: the code, with `# bad` on each line that is an error, and what both checkers say there.
MISTAKES: dict[str, tuple[str, str]] = {
    "misspelt_option": (
        """
app.consumer("t", concurency=5)  # bad
consumer("t", concurency=5)  # bad
""",
        "concurency",
    ),
    "option_of_a_wrong_type": (
        """
app.consumer("t", concurrency="5")  # bad
app.consumer("t", timeout="soon")  # bad
app.consumer("t", retry=3)  # bad
app.consumer("t", batchers={"s3": 5})  # bad
""",
        "",
    ),
    "option_with_a_word_that_there_is_not": (
        """
app.consumer("t", exhausted="dead-letter")  # bad
app.consumer("t", order_by="topic")  # bad
app.consumer("t", start="first")  # bad
""",
        "",
    ),
    "topic_that_is_no_string": (
        """
app.consumer(5)  # bad
app.consumer(b"t")  # bad
""",
        "str",
    ),
    "decorator_without_parentheses": (
        """
@app.consumer  # bad
async def handle(message: Message[str]) -> None: ...
""",
        "str",
    ),
    "handler_of_something_else": (
        """
@app.consumer("t")  # bad
async def handle(message: Payment) -> None: ...
""",
        "",
    ),
    "handler_without_a_message": (
        """
@app.consumer("t")  # bad
async def handle() -> None: ...
""",
        "",
    ),
    "handler_with_three_arguments": (
        """
@app.consumer("t")  # bad
async def handle(message: Message[str], ledger: str, more: str) -> None: ...
""",
        "",
    ),
    "payload_used_as_another_type": (
        """
@app.consumer("t")
async def handle(message: Message[Payment]) -> None:
    print(message.payload.amount)  # bad
    total: str = message.payload.cents  # bad
""",
        "",
    ),
    "batch_key_of_another_type": (
        """
payments.batch(key=lambda entry: entry.curency)  # bad
""",
        "curency",
    ),
    "batch_key_without_a_hash": (
        """
def by_list(entry: Entry) -> list[str]: return []
def by_payment(payment: Payment) -> str: return ""
payments.batch(key=by_list)  # bad
payments.batch(key=by_payment)  # bad
""",
        "key",
    ),
    "batch_option_that_there_is_not": (
        """
payments.batch(sise=5)  # bad
payments.batch(size="5")  # bad
""",
        "",
    ),
    "batch_without_parentheses": (
        """
@payments.batch  # bad
async def book(batch: Batch[Entry]) -> None: ...
""",
        "str",
    ),
    "batch_values_used_as_another_type": (
        """
@payments.batch()
async def book(batch: Batch[Entry]) -> None:
    batch.values[0].cents  # bad
    batch.append(batch[0])  # bad
    batch[0] = batch[0]  # bad
""",
        "",
    ),
    "batch_failed_with_a_number": (
        """
async def book(batch: Batch[Entry]) -> None:
    batch[0].fail(5)  # bad
""",
        "BaseException",
    ),
    "class_that_handles_another_type": (
        """
@app.consumer("t")
class Payments(Consumer[Payment]):
    async def handle(self, message: Message[str]) -> None: ...  # bad
""",
        "handle",
    ),
    "class_whose_handler_takes_more": (
        """
@app.consumer("t")
class Payments(Consumer[Payment]):
    async def handle(self, message: Message[Payment], ledger: str) -> None: ...  # bad
""",
        "handle",
    ),
    "class_hook_that_answers_something_else": (
        """
@app.consumer("t")
class Payments(Consumer[Payment]):
    def handle_error(self, message: Message[Payment], error: BaseException) -> int: ...  # bad
""",
        "handle_error",
    ),
    "headers_that_are_no_strings": (
        """
async def main() -> None:
    await app.publish("t", 1, headers={"a": 1})  # bad
    await app.publish("t", 1, delay="5")  # bad
    await app.publish("t", 1, key=5)  # bad
async def handle(message: Message[str]) -> None:
    message.publish("t", 1, headers={"a": 1})  # bad
""",
        "",
    ),
    "awaiting_forgotten": (
        """
async def handle(message: Message[str]) -> None:
    sent: str = app.publish("t", 1)  # bad
""",
        "Coroutine",
    ),
    "options_of_the_app": (
        """
App("memory://", grup="x")  # bad
App("memory://", give_up="stop")  # bad
App(5)  # bad
""",
        "",
    ),
    "values_of_retry_and_batching": (
        """
Retry(attempts="3")  # bad
Retry(never=[ValueError])  # bad
Retry(3)  # bad
Batching(size="3")  # bad
RetryLater("5")  # bad
""",
        "",
    ),
    "values_that_never_change": (
        """
Retry().attempts = 5  # bad
Batching().size = 5  # bad
""",
        "",
    ),
}


def run(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=120).stdout


def pyright(folder: Path) -> Found:
    """Errors of strict pyright over all files of a folder."""
    settings = {"include": ["."], "typeCheckingMode": "strict", "pythonVersion": "3.11", "extraPaths": [str(SOURCE)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    tool = TOOLS / "pyright"
    if not tool.exists():
        pytest.skip("pyright is not installed")
    found: dict[str, dict[int, str]] = {}
    output = run(tool, "--outputjson", "--pythonpath", sys.executable, "--project", folder)
    for one in json.loads(output)["generalDiagnostics"]:
        lines = found.setdefault(Path(one["file"]).name, {})
        number = one["range"]["start"]["line"] + 1
        lines[number] = lines.get(number, "") + one["message"] + "\n"
    return found


def mypy(folder: Path) -> Found:
    """Errors of strict mypy over all files of a folder."""
    settings = folder / "mypy.ini"
    settings.write_text(f"[mypy]\nstrict = True\npython_version = 3.11\nmypy_path = {SOURCE}\n", encoding="utf-8")
    if not (TOOLS / "mypy").exists():
        pytest.skip("mypy is not installed")
    cache = folder.parent / "mypy-cache"
    output = run(TOOLS / "mypy", "--config-file", settings, "--cache-dir", cache, "--no-error-summary", folder)
    found: dict[str, dict[int, str]] = {}
    for line in output.splitlines():
        match = re.match(r"(.+?\.py):(\d+): error: (.*)", line)
        if match:
            lines = found.setdefault(Path(match[1]).name, {})
            lines[int(match[2])] = lines.get(int(match[2]), "") + match[3] + "\n"
    return found


CHECKERS = {"pyright": pyright, "mypy": mypy}


@pytest.fixture(scope="module", params=CHECKERS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What one checker says of the good code and of all the mistakes, in one run."""
    folder = tmp_path_factory.mktemp("typing") / "samples"
    folder.mkdir()
    (folder / "good.py").write_text((HERE / "good.py").read_text(encoding="utf-8"), encoding="utf-8")
    for name, (code, _) in MISTAKES.items():
        (folder / f"{name}.py").write_text(START + code, encoding="utf-8")
    return CHECKERS[request.param](folder)


def test_what_users_write_has_no_errors(found: Found) -> None:
    assert found.get("good.py", {}) == {}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_an_error_on_its_own_line(found: Found, name: str) -> None:
    code, text = MISTAKES[name]
    lines = (START + code).splitlines()
    bad = {number for number, line in enumerate(lines, 1) if line.endswith("# bad")}
    start = len(START.splitlines())
    told = {number: said for number, said in found.get(f"{name}.py", {}).items() if number > start}
    missing = [lines[number - 1] for number in sorted(bad - told.keys())]
    assert missing == [], told
    assert told.keys() == bad, told
    for number in bad:
        assert text.lower() in told[number].lower()


def test_the_samples_run() -> None:
    from tests.typing import good

    assert list(good.app.consumers) == ["greet", "payments", "orders", "Payments"]
    assert good.payments.batchings()["default"].size == 50
    assert list(good.declared_apart.consumers) == ["raw", "Plain"]
