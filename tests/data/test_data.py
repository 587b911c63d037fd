from __future__ import annotations

import json

import pytest

from powerflow_fast.data import PromptRow, check_lengths, encode_prompt, epoch_order, load_prompts, prompt_indices
from powerflow_fast.errors import ConfigError, DataError


def chat(text):
    return [{"role": "user", "content": text}]


@pytest.fixture
def make_tokenizer():
    """Word-level tokenizers: with or without automatic BOS and EOS, with or without a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", "user", "system", "assistant", "one", "two", "three", ":"]

    def make(*, bos=False, eos=False, template=False):
        core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if bos or eos:
            single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
            core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        if template:
            tokenizer.chat_template = (
                "<s>{% for m in messages %} {{ m.role }} : {{ m.content }}{% endfor %}"
                "{% if add_generation_prompt %} assistant :{% endif %}"
            )
        return tokenizer

    return make


def test_lists():
    prompts = load_prompts(["one", chat("two"), {"prompt": "three", "answer": 3}])
    assert len(prompts) == 3
    assert prompts[0] == PromptRow("one", {}, "prompts[0]")
    assert prompts[1].prompt == chat("two")
    assert prompts[2].prompt == "three" and prompts[2].extra == {"answer": 3}
    assert [r.where for r in prompts] == ["prompts[0]", "prompts[1]", "prompts[2]"]
    assert load_prompts(prompts) is prompts
    with pytest.raises(IndexError):
        prompts[3]


def write(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def test_every_source_gives_the_same_rows(tmp_path):
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"prompt": f"zähle bis {i}", "answer": i} for i in range(5)]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    sources = [
        rows,
        tmp_path / "a.jsonl",
        str(tmp_path / "b.json"),
        tmp_path / "c.parquet",
        datasets.Dataset.from_list(rows),
    ]
    loaded = [load_prompts(s) for s in sources]
    for prompts in loaded:
        assert [(r.prompt, r.extra) for r in prompts] == [(r["prompt"], {"answer": r["answer"]}) for r in rows]
        assert prompts[3].extra["answer"] == 3
    assert len({p.fingerprint for p in loaded}) == 1
    rows[2]["answer"] = 9
    assert load_prompts(rows).fingerprint != loaded[0].fingerprint
    assert loaded[1].description.startswith("a.jsonl (5 prompts, sha256 of their content ")


def test_line_files(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone\r\n\r\n   \n  two \u2028 words\nthree".encode())
    prompts = load_prompts(path)
    assert [r.prompt for r in prompts] == ["one", "  two \u2028 words", "three"]
    assert [r.where for r in prompts] == [f"{path}:1", f"{path}:4", f"{path}:5"]
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf"one"\n\n[{"role": "user", "content": "two"}]\n{"question": "three"}')
    prompts = load_prompts(path)
    assert [r.prompt for r in prompts] == ["one", chat("two"), "three"]
    assert prompts[2].where == f"{path}:4"


def test_columns():
    assert load_prompts([{"messages": chat("a"), "x": 1}])[0].prompt == chat("a")
    assert load_prompts([{"problem": "a", "prompt": "b"}], column="problem")[0] == PromptRow(
        "a", {"prompt": "b"}, "prompts[0]"
    )
    with pytest.raises(
        DataError, match=r"prompts\[0\]: no prompt column: expected one of 'prompt'.*found 'text', 'answer'"
    ):
        load_prompts([{"text": "a", "answer": 1}])
    with pytest.raises(DataError, match="expected 'problem', found 'prompt'"):
        load_prompts([{"prompt": "a"}], column="problem")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "holds no prompts"),
        (["a", 3], r"prompts\[1\]: .*string or a list of chat messages, got int"),
        (["a", "b", " \n"], r"prompts\[2\]: the prompt is blank"),
        ([[]], r"prompts\[0\]: the list of chat messages is empty"),
        ([[{"role": "user"}]], r"message 0 must be a dict of 'role' and 'content'"),
        ([[{"role": "user", "content": " "}]], "blank"),
        ([[*chat("q"), {"role": "assistant", "content": "a"}]], "the last message is the assistant's"),
        ([{"prompt": None}], r"prompts\[0\]: .*got NoneType"),
        (12, "prompts must be a list .* got int"),
        ("Write a poem", "Write a poem: does not exist; .*a list of strings"),
    ],
)
def test_bad_prompts(prompts, message):
    with pytest.raises(DataError, match=message):
        load_prompts(prompts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'"one"\n\n{"prompt": "two"\n', r"a\.jsonl:3: not valid JSON: .* column"),
        ("a.jsonl", b'"one"\n{"prompt": 5}\n', r"a\.jsonl:2: .*got int"),
        ("a.jsonl", b'"one"\n"\xff"\n', r"a\.jsonl:2: not UTF-8"),
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.txt", b"\n \n", r"a\.txt: the file is empty"),
        ("a.txt", b"one\ntw\xff\n", r"a\.txt:2: not UTF-8"),
        ("a.json", b'["one",\n oops]', r"a\.json:2: not valid JSON"),
        ("a.json", b'{"prompt": "one"}', "JSON array of prompts, got dict"),
        ("a.json", b"[]", "holds no prompts"),
        ("a.json", b'"\xff"', "not UTF-8"),
        ("a.parquet", b"PAR1 but not really PAR1", r"a\.parquet: cannot read"),
        ("a.csv", b"prompt\none\n", r"a\.csv: prompts must be a \.jsonl, .*got \.csv"),
    ],
)
def test_bad_files_name_the_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_prompts(path)


def test_bad_containers(tmp_path):
    import datasets

    with pytest.raises(DataError, match="is a folder"):
        load_prompts(tmp_path)
    split = datasets.Dataset.from_list([{"prompt": "a"}])
    with pytest.raises(DataError, match=r"DatasetDict: pass one of its splits \['train'\]"):
        load_prompts(datasets.DatasetDict(train=split))
    with pytest.raises(DataError, match=r"IterableDataset: pass a datasets\.Dataset"):
        load_prompts(split.to_iterable_dataset())


def test_text_prompts_have_one_bos_and_no_added_eos(make_tokenizer):
    plain, both = make_tokenizer(), make_tokenizer(bos=True, eos=True)
    assert encode_prompt(PromptRow("one two"), plain) == [6, 7]
    assert encode_prompt(PromptRow("one two"), both) == [0, 6, 7]
    assert encode_prompt(PromptRow("<s> one two"), both) == [0, 6, 7]
    assert encode_prompt(PromptRow("one </s>"), plain) == [6, 1]  # what the user wrote stays


def test_chat_prompts(make_tokenizer):
    tokenizer = make_tokenizer(bos=True, eos=True, template=True)
    asked = [0, 3, 9, 6, 5, 9]
    assert encode_prompt(PromptRow(chat("one")), tokenizer) == asked
    assert encode_prompt(PromptRow("one"), tokenizer) == asked
    assert encode_prompt(PromptRow("one"), tokenizer, use_chat_template=False) == [0, 6]
    with_system = encode_prompt(PromptRow("one"), tokenizer, system_prompt="two")
    assert with_system == [0, 4, 9, 7, 3, 9, 6, 5, 9]
    own = [{"role": "system", "content": "three"}, *chat("one")]
    assert encode_prompt(PromptRow(own), tokenizer, system_prompt="two") == [0, 4, 9, 8, 3, 9, 6, 5, 9]


def test_encoding_errors(make_tokenizer):
    plain, template = make_tokenizer(), make_tokenizer(template=True)
    with pytest.raises(DataError, match="file:3: needs a chat template"):
        encode_prompt(PromptRow(chat("one"), where="file:3"), plain)
    with pytest.raises(DataError, match="needs a chat template"):
        encode_prompt(PromptRow("one"), plain, use_chat_template=True)
    with pytest.raises(DataError, match="use_chat_template is False"):
        encode_prompt(PromptRow(chat("one")), template, use_chat_template=False)
    with pytest.raises(ConfigError, match="system_prompt needs a chat template"):
        encode_prompt(PromptRow("one"), plain, system_prompt="two")
    with pytest.raises(DataError, match="file:3: prompt has 3 tokens, max_prompt_length is 2"):
        encode_prompt(PromptRow("one two three", where="file:3"), plain, max_prompt_length=2)
    with pytest.raises(DataError, match="makes no tokens"):
        encode_prompt(PromptRow(" "), plain)
    template.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"refused this prompt: roles must alternate"):
        encode_prompt(PromptRow("one"), template)


def test_check_lengths(make_tokenizer):
    tokenizer = make_tokenizer()
    prompts = load_prompts(["one", "one two", "one two three", *["two two two two"] * 6])
    assert check_lengths(prompts, tokenizer, max_prompt_length=4) == 4
    with pytest.raises(DataError) as error:
        check_lengths(prompts, tokenizer, max_prompt_length=2)
    message = str(error.value)
    assert "7 of 9 prompts are longer than max_prompt_length=2: prompts[2] (3 tokens), prompts[3] (4 tokens)" in message
    assert message.count("tokens)") == 5 and message.endswith("set max_prompt_length=4")


def test_epoch_order_is_a_fixed_permutation():
    order = epoch_order(100, seed=1, epoch=2)
    assert sorted(order) == list(range(100)) and order != list(range(100))
    assert epoch_order(100, seed=1, epoch=2) == order
    assert epoch_order(100, seed=1, epoch=3) != order and epoch_order(100, seed=2, epoch=2) != order
    order[0] = -1
    assert epoch_order(100, seed=1, epoch=2)[0] != -1
    # A resumed run on another machine or Python version must see the same prompts.
    assert epoch_order(6, seed=0, epoch=0) == [0, 5, 1, 4, 3, 2]


def test_prompt_indices_lay_the_epochs_end_to_end():
    n, size = 10, 4
    expected = [i for epoch in range(4) for i in epoch_order(n, seed=3, epoch=epoch)]
    batches = [prompt_indices(step, size, n, 3) for step in range(10)]
    assert [i for batch in batches for i in batch] == expected
    assert prompt_indices(7, size, n, 3) == batches[7]
    assert sorted(prompt_indices(0, 3, 1, 0)) == [0, 0, 0]
