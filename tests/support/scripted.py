"""A model that writes what it is told to: real weights and tokenizer, and responses from a script."""

import torch

from tests.support.flow import byte_tokenizer
from tests.support.tiny_models import tiny_model

PLAIN_CHAT = "{{ messages[0]['content'] }}\n"


def scripted_model(respond, template: str = PLAIN_CHAT):
    """A tiny model and its tokenizer, of one token a byte.

    Args:
        respond: a function from the text of a prompt to the text of its response; the end of the turn follows, unless
            the text ends in an ellipsis.
        template: the chat template.
    """
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.padding_side = "left"

    def generate(input_ids, attention_mask, **_):
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = respond(tokenizer.decode(ids[mask.bool()]))
            rows.append(tokenizer.encode(text, add_special_tokens=False) + [2] * (not text.endswith("...")))
        width = max(map(len, rows))
        made = [row + [0] * (width - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(made)], dim=1)

    model.generate = generate
    return model, tokenizer
