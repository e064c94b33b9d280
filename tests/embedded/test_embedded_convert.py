"""What the conversion makes of a GGUF file."""

from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from moeadapt.embedded import convert
from moeadapt.embedded.convert import CHAT_TEMPLATE, convert_gguf
from moeadapt.errors import AssetError
from tests.embedded.tiny_gguf import GGUF_TEMPLATE, TinyFile

USER = {"role": "user", "content": "Hi"}
PARIS = {"role": "assistant", "content": " the12"}
SYSTEM = {"role": "system", "content": "in"}


@pytest.fixture(scope="module")
def folder(tiny_file: TinyFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    convert_gguf(tiny_file.path, out)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_the_converted_model_is_the_one_that_was_written(
    either_file: TinyFile, tmp_path: Path
) -> None:
    convert_gguf(either_file.path, tmp_path / "out")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for name, value in converted.state_dict().items():
        assert torch.equal(value, either_file.model.state_dict()[name]), name
    assert torch.equal(logits_of(converted), logits_of(either_file.model))


def test_the_converted_model_is_an_ordinary_bfloat16_one(folder: Path, tmp_path: Path) -> None:
    converted = AutoModelForCausalLM.from_pretrained(folder)
    assert converted.dtype == torch.bfloat16
    assert not hasattr(converted, "hf_quantizer")
    converted.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_the_config_is_the_one_that_was_written(either_file: TinyFile, tmp_path: Path) -> None:
    convert_gguf(either_file.path, tmp_path / "out")
    found = AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    wanted = either_file.model.config.to_dict()
    assert {key for key in wanted if found[key] != wanted[key]} <= {
        *("architectures", "dtype", "_name_or_path", "transformers_version"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    }
    assert [found[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")] == [1, 2, 2]


def test_the_tokenizer_splits_digits_and_gives_the_text_back(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = " the thin\n  été 1234 <|im_end|>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(ids)
    # "12" is a merge of this vocabulary, but digits are split before merging.
    assert tokens[0] == "Ġthe"
    assert "12" not in tokens
    assert tokens[-1] == "<|im_end|>"


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "no prompt"])
@pytest.mark.parametrize(
    "messages",
    [[USER], [USER, PARIS], [SYSTEM, USER, PARIS, USER, PARIS], [SYSTEM], [PARIS, USER]],
    ids=lambda messages: "-".join(message["role"] for message in messages),
)
def test_the_marked_chat_template_renders_what_the_original_renders(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool
) -> None:
    ours, original = (
        tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        for template in (None, GGUF_TEMPLATE)
    )
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert ours == original


def test_the_template_marks_what_the_assistant_says_and_its_end(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    chat = tokenizer.apply_chat_template(
        [SYSTEM, USER, PARIS, USER, PARIS], return_dict=True, return_assistant_tokens_mask=True
    )
    said = [
        token
        for token, mine in zip(chat["input_ids"], chat["assistant_masks"], strict=True)
        if mine
    ]
    assert tokenizer.decode(said) == " the12<|im_end|> the12<|im_end|>"


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "other.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AssetError, match="'gemma'"):
        convert_gguf(tmp_path / "other.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_lacks_a_tensor_is_refused(
    tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(convert._BLOCK_NAMES, "ffn_up")
    with pytest.raises(AssetError, match=r"blk\.0\.ffn_up\.weight"):
        convert_gguf(tiny_file.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
