"""Tests of reduced chat templates: they render as the template does, or a note has the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import chat_templates

from kvexport.build.chat_template import ReducedTemplate, reduce_chat_template
from kvexport.bundle.chat_format import Chat

BY_LENGTH = chat_templates.ZEPHYR.replace("eos_token", "(eos_token if message.content|length < 22 else '')")
ENDLESS = "{% for a in range(99999) %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfor %}"
TOKENS = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "unk_token": None}


def reduce(folder: Path, template: object, **config: object) -> ReducedTemplate:
    (folder / "tokenizer_config.json").write_text(json.dumps({**TOKENS, "chat_template": template, **config}))
    return reduce_chat_template(folder)


def chat_of(folder: Path, template: str, notes: int = 0) -> Chat:
    result = reduce(folder, template)
    assert result.chat is not None, result.notes
    assert len(result.notes) == notes, result.notes
    assert all(result.chat.conversation(messages) == text for messages, text in result.samples)
    with_system = any(messages[0]["role"] == "system" for messages, _ in result.samples)
    assert with_system == (result.chat.begin_system is not None) and len(result.samples) == (
        7 if with_system else 4
    )
    return result.chat


def test_chatml_with_a_default_system_prompt(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, chat_templates.CHATML)
    assert chat.begin == "<|im_start|>system\nYou are a default.<|im_end|>\n<|im_start|>user\n"
    assert chat.begin_system == ("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n")
    assert (
        chat.generate == "<|im_end|>\n<|im_start|>assistant\n"
        and chat.next == "<|im_end|>\n<|im_start|>user\n"
    )
    assert not chat.strips


def test_template_that_removes_thinking_blocks_of_past_turns(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, chat_templates.THINKING)
    assert chat.begin == "<|im_start|>user\n" and chat.generate == "<|im_end|>\n<|im_start|>assistant\n"


def test_llama_2(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, chat_templates.LLAMA2)
    assert chat == Chat(
        "<s>[INST] ",
        ("<s>[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
        " [/INST]",
        " ",
        " </s><s>[INST] ",
        strips=True,
    )


def test_llama_3_gets_a_fixed_date(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, chat_templates.LLAMA3, notes=1)
    assert chat.strips and "Today Date: 26 Jul 2024\n" in chat.begin
    assert "date" in reduce(tmp_path, chat_templates.LLAMA3).notes[0]


def test_mistral_without_a_system_prompt(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, chat_templates.MISTRAL1, notes=1)
    assert chat == Chat("<s>[INST] ", None, " [/INST]", "", "</s>[INST] ", strips=False)
    assert "roles must alternate" in reduce(tmp_path, chat_templates.MISTRAL1).notes[0]


def test_mistral_that_moves_the_system_prompt_to_the_last_turn(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, chat_templates.MISTRAL3, notes=1)
    assert chat.begin_system is None and chat.next == "</s>[INST] "
    assert "system prompt cannot be reduced" in reduce(tmp_path, chat_templates.MISTRAL3).notes[0]


def test_zephyr(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, chat_templates.ZEPHYR)
    assert chat.begin == "<|user|>\n" and chat.begin_system == ("<|system|>\n", "</s>\n<|user|>\n")


def test_gemma_has_no_system_prompt(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, chat_templates.GEMMA, notes=1)
    assert chat.strips and chat.generate == "<end_of_turn>\n<start_of_turn>model\n"


def test_phi_3(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, chat_templates.PHI3)
    assert chat.next == "<|end|>\n<|user|>\n"


def test_checkpoint_without_a_template(tmp_path: Path) -> None:
    assert reduce_chat_template(tmp_path) == ReducedTemplate(None, (), ())
    assert reduce(tmp_path, None) == ReducedTemplate(None, (), ())


def test_finds_the_template_in_each_file(tmp_path: Path) -> None:
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": chat_templates.ZEPHYR}]
    assert reduce(tmp_path, several).chat is not None
    assert reduce(tmp_path, several[:1]) == ReducedTemplate(None, (), ())
    (tmp_path / "chat_template.jinja").write_text(chat_templates.GEMMA)
    chat = reduce(tmp_path, several).chat
    assert chat is not None and chat.begin.startswith("<s><start_of_turn>")


def test_reads_special_tokens_from_special_tokens_map_json(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<old>", "bos_token": "<begin>"})
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "chat_template": chat_templates.MISTRAL1})
    )
    chat = reduce_chat_template(tmp_path).chat
    assert chat is not None and chat.begin.startswith("<begin>") and chat.next.startswith("</s>")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        pytest.param(chat_templates.PREFILLED, "all turns in the same way", id="prefilled"),
        pytest.param("{{ messages[0].content }}", "every message exactly once", id="first-only"),
        pytest.param(
            chat_templates.ZEPHYR + "{{ messages[-1].content }}", "every message exactly once", id="twice"
        ),
        pytest.param(
            "{% for m in messages %}{{ m.content|upper }}{% endfor %}",
            "every message exactly once",
            id="upper",
        ),
        pytest.param(BY_LENGTH, "where the reduced form writes", id="by-length"),
        pytest.param("{% for %}", "TemplateSyntaxError", id="syntax"),
        pytest.param("{{ undefined.attribute }}", "undefined", id="undefined"),
        pytest.param("{{ ().__class__.__mro__[1].__subclasses__() }}", "unsafe", id="escape"),
        pytest.param("{% include '/etc/passwd' %}", "no loader", id="file"),
        pytest.param(ENDLESS, "characters", id="endless"),
        pytest.param("{{ 'a' * 5000000000 }}", "", id="memory"),
        pytest.param(["no", "templates"], None, id="nothing-named"),
        pytest.param(7, "must be a string", id="number"),
    ],
)
def test_a_template_that_cannot_be_reduced_gives_a_note(
    tmp_path: Path, template: object, reason: str | None
) -> None:
    result = reduce(tmp_path, template)
    assert result.chat is None and result.samples == ()
    if reason is None:
        assert result.notes == ()
    else:
        (note,) = result.notes
        assert (
            note.startswith("the chat template cannot be reduced")
            and reason in note
            and "Text generation is not affected" in note
        )


def test_a_template_that_does_not_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvexport.model.jinja_sandbox._SECONDS", 2)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert "2 seconds" in reduce(tmp_path, loops).notes[0]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["[1]", "{", '{"chat_template": "\\ud800"}'])
def test_damaged_files_do_not_stop_the_build(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": chat_templates.ZEPHYR, "eos_token": "e"})
    )
    (tmp_path / name).write_text(content)
    assert reduce_chat_template(tmp_path).chat is None or name == "special_tokens_map.json"
