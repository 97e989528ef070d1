"""A character-level tokenizer with a chat template, in plain Hugging Face form.

Every printable ASCII character is a token, so there is nothing to train and nothing to surprise.
The tool-call marks are single tokens but not "special", as in larger models: they must survive
`skip_special_tokens`, or no verifier could see a call. No base text ever contains them.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
UNKNOWN = "<|unk|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CALL_START = "<tool_call>"
CALL_END = "</tool_call>"
SPECIAL = (END_OF_TEXT, PAD, UNKNOWN, TURN_START, TURN_END)
MAX_LENGTH = 512

# Offered tools become `name(argument,...)` in the system turn. Properties without a schema are
# skipped: columnar readers give every row the other rows' properties, empty.
CHAT_TEMPLATE = (
    "{%- if messages[0].role == 'system' or tools %}"
    "{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}"
    "{%- for tool in tools or [] %}"
    "{{- '' if loop.first and messages[0].role != 'system' else ' ' }}"
    "{{- tool.function.name + '(' }}"
    "{%- set offered = (tool.function.parameters or {}).properties or {} %}"
    "{%- for name, schema in offered.items() if schema %}"
    "{{- name if loop.first else ',' + name }}"
    "{%- endfor %}"
    "{{- ')' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- generation %}"
    "{{- message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>{\"name\":' + call.function.name | tojson + ',\"arguments\":' }}"
    "{%- if call.function.arguments is string %}{{- call.function.arguments }}"
    "{%- else %}{{- call.function.arguments | tojson(separators=(',', ':')) }}{%- endif %}"
    "{{- '}</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>' }}"
    "{%- endgeneration %}"
    "{{- '\n' }}"
    "{%- elif message.role != 'system' %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny world's tokenizer: save it with `save_pretrained`, load it with AutoTokenizer."""
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, CALL_START, CALL_END, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in (CALL_START, CALL_END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
