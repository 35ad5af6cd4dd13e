"""The testbed's tokenizer, made in code: one token per character, and one per word of the fixed prompt texts.

Texts of printable ASCII and newlines come back exactly. Left out: every other character, which becomes the unknown
token. The special tokens are written with a character outside ASCII, so that no ASCII text can spell one.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "⟨pad⟩", "⟨eos⟩", "⟨unk⟩"
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
WORDS = ("Spell", " this", " word", " backward", " (example:", " sun", " ->", " nus):")
CHARACTERS = (*map(chr, range(32, 127)), "\n")
VOCABULARY = (PAD, EOS, UNK, *WORDS, *CHARACTERS)

# A user message is its content and nothing else, so that a prompt has the same tokens as a chat and as plain text.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% elif message['role'] == 'system' %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)


def testbed_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer of 107 tokens; every call makes an equal one.

    Digits are always single tokens. `decode(ids, skip_special_tokens=True)` restores printable ASCII and newlines.
    The chat template writes a user message as its content, a system message with a newline after it, and an
    assistant message with the EOS token after it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(VOCABULARY)}
    pieces = Regex("|".join([*map(re.escape, WORDS), r"[\s\S]"]))
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
    )
