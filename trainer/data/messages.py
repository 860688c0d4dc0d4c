"""Conversations: text through a chat template, with the loss on the assistant's answers only."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from strategies.errors import ConfigError
from trainer.data.base import Tokenizer
from trainer.data.dataset import AbstractDatasetData
from trainer.data.language import Document
from trainer.data.packing import Packing
from trainer.data.tokenizers import first_line
from trainer.place import at_home

PLAIN_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""For tokenizers that bring none."""

Pieces = list[tuple[str, bool]]


@final
@dataclass(kw_only=True)
class MessagesData(AbstractDatasetData):
    """Rows with a list of messages, each `{role, content}`; only what role `assistant` says is learned.

    What is learned of an answer begins where generation will begin (after the template's prompt for it)
    and includes the mark that ends it.
    """

    packing: Packing = Packing.whole
    """How conversations become samples."""
    messages_field: str = "messages"
    """The field that holds the list of messages."""
    template: str | None = None
    """A Jinja chat template, or a file that holds one; None: the tokenizer's own, or a plain one."""

    @property
    def _key(self) -> Any:
        return [self.messages_field, self._given_template]

    @functools.cached_property
    def _given_template(self) -> str | None:
        if self.template is None or "{" in self.template:
            return self.template
        try:
            return at_home(self.template).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"MessagesData: template={self.template!r} is no readable file, nor a template. "
                "Correct it (data.template)."
            ) from error

    def _document(self, row: Mapping[str, Any], where: str, tokenizer: Tokenizer) -> Document | None:
        where = f"MessagesData: {where}"
        messages = self._messages(row, where)
        template = self._given_template or tokenizer.chat_template or PLAIN_TEMPLATE
        try:
            return Document(pieces=cut_at_answers(messages, template, tokenizer.special_tokens()), validation=False)
        except ConfigError:
            raise
        except Exception as error:  # templates run code of their own, and raise whatever they like
            raise ConfigError(
                f"{where} doesn't go through the chat template: {first_line(error)}. "
                "Correct the row, or give another template (data.template)."
            ) from error

    def _messages(self, row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        found = row.get(self.messages_field)
        if not isinstance(found, list) or not all(isinstance(message, dict) and "role" in message for message in found):
            raise ConfigError(
                f"{where} has no list of messages with a role each in field {self.messages_field!r}, only "
                f"{', '.join(row)}. Name the right one (data.messages_field)."
            )
        if not any(message["role"] == "assistant" for message in found):
            raise ConfigError(
                f"{where} has no message of role 'assistant', so there is nothing to learn. Remove it (data.files)."
            )
        # A table has every key in every row; those that a message doesn't use are None.
        return [{key: value for key, value in message.items() if value is not None} for message in found]


def cut_at_answers(messages: Sequence[Mapping[str, Any]], template: str, specials: Mapping[str, str]) -> Pieces:
    """The text of a conversation in pieces, and whether each is an answer.

    Pieces are to be tokenised apart, because an answer will be generated after a prompt that was
    tokenised alone.

    Raises:
        ConfigError: the template writes a conversation's beginning differently once it goes on, so that
            the answers can't be told from the rest.
    """
    whole = _render(messages, template, specials, False)
    pieces: Pieces = []
    done = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:number], template, specials, True)
        answered = _render(messages[: number + 1], template, specials, False)
        if not (whole.startswith(answered) and answered.startswith(prompt) and len(prompt) >= done):
            raise ConfigError(
                "MessagesData: the chat template changes what came before when a conversation goes on, so its answers "
                "can't be told apart. Give a template that only appends (data.template)."
            )
        pieces += [(whole[done : len(prompt)], False), (whole[len(prompt) : len(answered)], True)]
        done = len(answered)
    pieces.append((whole[done:], False))
    return [(text, answer) for text, answer in pieces if text]


def _render(
    messages: Sequence[Mapping[str, Any]], template: str, specials: Mapping[str, str], add_generation_prompt: bool
) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        conversations=[list(messages)], chat_template=template, add_generation_prompt=add_generation_prompt, **specials
    )
    return str(rendered[0])
