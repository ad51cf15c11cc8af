"""vLLM's OpenAI server over two ranks, each with half the head: chat, streaming, stop strings, many at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from .engines import engine, vllm
from .server import counter, server

openai = pytest.importorskip("openai")
TEXTS = [f"Say {word} and go on." for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]
TOKENS = 24


def messages(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def expected(model):
    """The answers of one process without speculation."""
    params = vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    with engine(model) as llm:
        outputs = llm.chat([messages(text) for text in TEXTS], params, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    options = ["--load-format", "layerskip", "--model-loader-extra-config", '{"exit_layer": 2}']
    sizes = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "48M"]
    ranks = ["--tensor-parallel-size", "2", "--enforce-eager", "--served-model-name", "tiny"]
    log = tmp_path_factory.mktemp("server") / "log"
    with server(model, log, *options, *sizes, *ranks) as where:
        yield where


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def chat(client, text, **options):
    defaults = {"temperature": 0.0, "max_tokens": TOKENS, "extra_body": {"ignore_eos": True}}
    return client.chat.completions.create(model="tiny", messages=messages(text), **{**defaults, **options})


def test_chat(client, expected):
    answer = chat(client, TEXTS[0])
    assert answer.choices[0].message.content == expected[0]
    assert answer.usage.completion_tokens == TOKENS


def test_streaming_gives_the_text_in_pieces(client, expected):
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat(client, TEXTS[1], stream=True)]
    assert "".join(pieces) == expected[1]
    assert len(pieces) > 2


def test_a_stop_string_cuts_inside_a_round(client, expected):
    whole = expected[2]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    answer = chat(client, TEXTS[2], stop=[stop]).choices[0]
    assert answer.message.content == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_eight_at_once(client, expected, address):
    before = [counter(address, f"vllm:spec_decode_num_{what}_tokens_total") for what in ("draft", "accepted")]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: chat(client, text).choices[0].message.content, TEXTS))
    assert answers == expected
    after = [counter(address, f"vllm:spec_decode_num_{what}_tokens_total") for what in ("draft", "accepted")]
    drafted, accepted = (now - then for now, then in zip(after, before, strict=True))
    assert accepted > 0.2 * drafted > 0


def test_a_client_that_leaves_does_not_disturb_the_others(client, expected):
    leaving = chat(client, TEXTS[3], stream=True, max_tokens=200)
    next(iter(leaving))
    leaving.close()
    assert chat(client, TEXTS[4]).choices[0].message.content == expected[4]


def test_a_temperature_is_a_bad_request_not_a_dead_server(client, expected):
    with pytest.raises(openai.BadRequestError, match="mend_cpu_sampling"):
        chat(client, TEXTS[0], temperature=0.7)
    assert chat(client, TEXTS[5]).choices[0].message.content == expected[5]
