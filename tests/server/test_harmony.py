"""OpenAI's harmony format: prompts for it, answers held to it, and answers taken apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import Grammar, InvalidRequest
from engine.text.chat import ChatTemplate
from engine.text.grammar import GrammarCompiler
from engine.text.tokenizer import Tokenizer, ends_among
from server import harmony
from server.answer_parser import Piece
from server.constraints import constraint
from server.dialect import dialect_of
from server.harmony import HarmonyParser, opening_of, told
from server.tools import FunctionTool, Offered
from tests.mock import byte_backend
from tests.server.process import ServerProcess
from tests.server.test_answer_parser import joined
from tests.tiny import write_llama

MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>")
MARKS += ("<|call|>", "<|return|>")
# The form of gpt-oss's, in short.
TEMPLATE = """
{%- set effort = reasoning_effort if reasoning_effort is defined else "medium" -%}
<|start|>system<|message|>Reasoning: {{ effort }}<|end|>
{%- if tools -%}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{%- endif -%}
{%- for m in messages -%}
{%- if m.thinking -%}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>
{%- endif -%}
{%- if m.tool_calls -%}
<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json
{{- "<|message|>" }}{{ m.tool_calls[0].function.arguments | tojson }}<|call|>
{%- elif m.role == "assistant" -%}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>
{%- else -%}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = FunctionTool("get_weather", "", PLACE)
STRICT = FunctionTool("get_weather", "", PLACE, strict=True)
FORM = Grammar("choice", '["yes", "no"]')
THOUGHT = "<|channel|>analysis<|message|>Hm, rain?<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
CALL = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
GOOD = '{"city": "Rome"}'


def parsed(cuts: list[str], opening: str = "assistant") -> list[Piece]:
    parser = HarmonyParser(names=("get_weather",), opening=opening)
    return [piece for text in cuts for piece in parser.push(text)] + parser.finish()


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        (THOUGHT + FINAL + "No.", "Hm, rain?", "No.", []),
        (FINAL + "Yes <b>\n <|b", "", "Yes <b>\n <|b", []),
        (THOUGHT + CALL + GOOD, "Hm, rain?", "", [("get_weather", GOOD)]),
        (THOUGHT + CALL + GOOD + "<|call|>", "Hm, rain?", "", [("get_weather", GOOD)]),
        (CALL + "<|call|>", "", "", [("get_weather", "{}")]),
        (
            " to=functions.get_weather<|channel|>commentary json<|message|>" + GOOD,
            "",
            "",
            [("get_weather", GOOD)],
        ),
        (
            "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant" + CALL + GOOD,
            "",
            "Let me look.",
            [("get_weather", GOOD)],
        ),
        (CALL.replace("get_weather", "other") + GOOD, "", GOOD, []),
        (THOUGHT + THOUGHT + FINAL + "A", "Hm, rain?\n\nHm, rain?", "A", []),
        (THOUGHT, "Hm, rain?", "", []),
        (THOUGHT[:32], "Hm", "", []),
        (FINAL + "  if a:\n", "", "  if a:\n", []),
        (FINAL + "Hi<|end|><|start|>assi", "", "Hi", []),
        ("<|channel|>fin", "", "", []),
        ("Plain words.", "", "Plain words.", []),
        (THOUGHT[:46] + "The answer is 4.", "Hm, rain?", "The answer is 4.", []),
        (FINAL + "A<|end|> B ", "", "A\n\nB", []),
        (CALL + '{"city" Rome}', "", "Rome}", [("get_weather", '{"city" ')]),
        (CALL + "Rome", "", "Rome", [("get_weather", "")]),
    ],
)
def test_an_answer_is_taken_apart_by_channel(
    text: str, reasoning: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert joined(parsed([text])) == (reasoning, content, calls)
    assert joined(parsed(list(text))) == (reasoning, content, calls)


@given(st.lists(st.integers(0, 200), max_size=6))
def test_it_does_not_matter_where_the_text_is_cut(places: list[int]) -> None:
    text = THOUGHT + "<|channel|>commentary<|message|>So:<|end|><|start|>assistant" + CALL + GOOD
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    cuts = [text[a:b] for a, b in pairwise(edges)]
    assert joined(parsed(cuts)) == joined(parsed([text]))


def test_an_answer_goes_on_with_the_message_that_its_prompt_has_begun() -> None:
    prompt = "<|start|>user<|message|>Hi<|end|><|start|>assistant" + FINAL + "Once upon"
    assert harmony.has_begun(prompt)
    assert joined(parsed([" a time"], opening_of(prompt))) == ("", " a time", [])
    assert not harmony.has_begun("<|start|>user<|message|>Hi<|end|><|start|>assistant")
    assert not harmony.has_begun("<|start|>user<|message|>Hi<|end|>")
    assert joined(parsed(["<|start|>assistant" + FINAL + "Yes"], "user<|message|>Hi<|end|>")) == (
        "",
        "Yes",
        [],
    )
    # What the prompt ends with is not said again, though it could have become a mark.
    assert joined(parsed([" b"], "assistant" + FINAL + "a <")) == ("", " b", [])


def test_any_text_and_any_marks_are_read_without_loss_of_order() -> None:
    @given(st.lists(st.sampled_from([*MARKS, "final", "analysis", " to=x", "a ", "{", "\n"])))
    def check(parts: list[str]) -> None:
        text = "".join(parts)
        assert joined(parsed(list(text))) == joined(parsed([text]))

    check()


def tokenizer() -> Tokenizer:
    backend = byte_backend(*MARKS)
    ends = [backend.token_to_id(end) for end in ("<|return|>", "<|call|>")]
    return Tokenizer(backend, eos_token_ids=ends, chat_template=TEMPLATE)


TOKENIZER = tokenizer()
COMPILER = GrammarCompiler(lambda: TOKENIZER, TOKENIZER.vocab_size)


def accepts(text: str, offered: Offered | None, form: Grammar | None, **more: Any) -> bool:
    options = {"reasons": True, "begun": False, "budget": None} | more
    dialect = dialect_of(TOKENIZER.chat_template)
    grammar = constraint(TOKENIZER, dialect, offered, form, **options)
    assert grammar is not None
    matcher = COMPILER.matcher(grammar)
    ids = TOKENIZER.encode(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_a_form_holds_the_final_message_and_leaves_reasoning_free() -> None:
    for before in ("", THOUGHT, THOUGHT * 2):
        assert accepts(before + FINAL + "yes", None, FORM)
        assert not accepts(before + FINAL + "maybe", None, FORM)
        assert not accepts(before + "yes", None, FORM)
    assert not accepts(THOUGHT + FINAL + "yes", None, FORM, reasons=False)
    assert accepts("yes", None, FORM, begun=True)


def test_a_forced_call_matches_its_schema() -> None:
    forced = Offered([WEATHER], "required")
    assert accepts(CALL + GOOD, forced, None)
    assert accepts(THOUGHT + CALL + GOOD, forced, None)
    said = "<|channel|>commentary<|message|>So:<|end|><|start|>assistant"
    assert accepts(said + CALL + GOOD, forced, None)
    assert not accepts(CALL + '{"city": "Bonn"}', forced, None)
    assert not accepts(THOUGHT + FINAL + "no", forced, None)


def test_a_strict_tool_may_be_called_but_only_rightly() -> None:
    offered = Offered([STRICT])
    assert accepts(FINAL + "no", offered, None)
    assert accepts(CALL + GOOD, offered, None)
    assert not accepts(CALL + "{}", offered, None)
    assert accepts(CALL + GOOD, offered, FORM)
    assert accepts(FINAL + "yes", offered, FORM)
    assert not accepts(FINAL + "maybe", offered, FORM)


def test_a_budget_ends_the_reasoning() -> None:
    assert accepts(THOUGHT + FINAL + "a", None, None, budget=20)
    assert not accepts(THOUGHT * 2 + FINAL + "a", None, None, budget=20)
    assert not accepts(THOUGHT + FINAL + "a", None, None, budget=5)


def test_without_wishes_there_is_no_grammar() -> None:
    dialect = dialect_of(TOKENIZER.chat_template)
    options: dict[str, Any] = {"reasons": True, "begun": False, "budget": None}
    assert dialect.style is harmony.STYLE
    assert constraint(TOKENIZER, dialect, Offered([WEATHER]), None, **options) is None


def test_a_grammar_of_ones_own_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="cannot be part of a larger one"):
        accepts("", None, Grammar("lark", 'start: "a"'))


def test_the_rest_of_a_message_is_held_to_its_form_and_cannot_become_a_call() -> None:
    assert accepts("any <text>", Offered([STRICT]), None, begun=True)
    assert not accepts(CALL + "{}", Offered([STRICT]), None, begun=True)
    with pytest.raises(InvalidRequest, match="cannot begin with a call"):
        accepts("", Offered([WEATHER], "required"), None, begun=True)


def test_results_stand_behind_their_calls_though_ids_come_again() -> None:
    call = {"id": "c0", "function": {"name": "f", "arguments": {}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    results = [{"role": "tool", "tool_call_id": "c0", "content": text} for text in ("one", "two")]
    lost = {"role": "tool", "tool_call_id": "c9", "content": "nobody's"}
    made = told([turn, results[0], turn, results[1], lost])
    assert [m["content"] for m in made] == ["", "one", "", "two", "nobody's"]
    assert made == told(made), "told twice it is the same"


@pytest.mark.parametrize(
    ("given", "shown"),
    [("none", "low"), ("xhigh", "high"), ("medium", "medium"), (["high"], ["high"])],
)
def test_efforts_are_those_that_the_template_knows(given: Any, shown: Any) -> None:
    assert harmony.variables({"reasoning_effort": given, "a": 1}) == {
        "reasoning_effort": shown,
        "a": 1,
    }
    assert harmony.variables({}) == {}


def test_messages_become_what_the_template_can_show() -> None:
    def call(name: str, identifier: str) -> dict[str, Any]:
        return {"id": identifier, "function": {"name": name, "arguments": {"a": identifier}}}

    messages = [
        {"role": "user", "content": "Go"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Two.",
            "tool_calls": [call("f", "1"), call("g", "2")],
        },
        {"role": "tool", "tool_call_id": "2", "content": "second"},
        {"role": "tool", "tool_call_id": "1", "content": "first"},
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "Done.", "reasoning_content": "Easy."},
    ]
    made = told(messages)
    assert [m["role"] for m in made] == [
        "system", "user", "assistant", "tool", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert made[0]["content"] == "Be brief."
    assert made[2]["thinking"] == "Two.\n\nLet me see."
    assert [m["content"] for m in made if m["role"] == "tool"] == ["first", "second"]
    assert [len(m["tool_calls"]) for m in made if "tool_calls" in m] == [1, 1]
    assert made[-1] == {"role": "assistant", "content": "Done."}
    shown = ChatTemplate(TEMPLATE, bos_token="", eos_token="").render(made)
    assert shown.index("to=functions.f") < shown.index("first") < shown.index("to=functions.g")


def test_what_ends_an_answer_is_not_what_ends_a_message() -> None:
    assert ends_among(["<|end|>", "<|call|>", "<|return|>", "a"]) == {"<|call|>", "<|return|>"}
    assert ends_among(["<|end|>", "a"]) == {"<|end|>"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A tiny random model that has the format's tokens and template."""
    folder = write_llama(
        tmp_path_factory.mktemp("models") / "harmony",
        max_position_embeddings=4096,
        vocab_size=264,
        eos_token_id=[262, 263],
    )
    byte_backend(*MARKS).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    arguments = ("--model", str(folder), "--dtype", "float32", "--set", "cache.tokens=16384")
    with ServerProcess(*arguments) as process:
        yield process
        assert process.idle(), "the tests left something running"


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": PLACE}}]
ASKED: Any = [{"role": "user", "content": "Is it raining in Rome?"}]


@pytest.mark.parametrize("effort", ["none", "high"])
def test_a_schema_holds_the_answer_and_reasoning_comes_apart(
    client: openai.OpenAI, effort: Any
) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "p", "schema": PLACE}}
    options: Any = {"extra_body": {"thinking_token_budget": 12}} if effort == "high" else {}
    answer = client.chat.completions.create(
        model="harmony",
        messages=ASKED,
        response_format=form,
        reasoning_effort=effort,
        seed=3,
        **options,
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(message.content or "")["city"] in ("Rome", "Oslo")
    assert "<|" not in (message.content or "")
    if effort == "none":
        assert not getattr(message, "reasoning_content", None)


def test_a_forced_call_streams_its_arguments(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="harmony",
        messages=ASKED,
        tools=TOOLS,
        tool_choice="required",
        stream=True,
        seed=1,
        extra_body={"thinking_token_budget": 8},
    )
    name, arguments, ends = "", "", []
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.function is not None
            name += call.function.name or ""
            arguments += call.function.arguments or ""
        ends.append(chunk.choices[0].finish_reason)
    assert name == "get_weather"
    assert json.loads(arguments)["city"] in ("Rome", "Oslo")
    assert ends[-1] == "tool_calls"


def test_results_of_several_calls_go_back(client: openai.OpenAI) -> None:
    calls: Any = [
        {
            "id": f"call{n}",
            "type": "function",
            "function": {"name": "get_weather", "arguments": json.dumps({"city": city})},
        }
        for n, city in enumerate(("Rome", "Oslo"))
    ]
    results: Any = [
        {"role": "tool", "tool_call_id": f"call{n}", "content": "dry"} for n in range(2)
    ]
    answer = client.chat.completions.create(
        model="harmony",
        messages=[*ASKED, {"role": "assistant", "tool_calls": calls}, *results],
        tools=TOOLS,
        max_tokens=4,
        temperature=0,
    )
    assert answer.choices[0].finish_reason == "length"


def test_other_protocols_have_its_reasoning_apart_too(server: ServerProcess) -> None:
    form = {"type": "json_schema", "name": "p", "schema": PLACE}
    body = {
        "model": "harmony",
        "input": "Is it raining?",
        "text": {"format": form},
        "reasoning": {"effort": "none"},
    }
    answer = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60).json()
    texts = [c["text"] for item in answer["output"] for c in item.get("content") or ()]
    assert json.loads(texts[-1])["city"] in ("Rome", "Oslo")
