"""How models on the hub are named, and which files of a repository are meant."""

from __future__ import annotations

import pytest

from edgellm.errors import UsageError
from edgellm.store.hubfiles import choose, data_guess
from edgellm.store.hubname import HubName, is_hub_name, is_repo_path, parse_hub_name

pytestmark = pytest.mark.pure

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GGUFS = [
    "README.md",
    "imatrix.gguf",
    "mmproj-model-f16.gguf",
    "m-BF16/m-BF16-00001-of-00002.gguf",
    "m-BF16/m-BF16-00002-of-00002.gguf",
    "m-IQ4_XS.gguf",
    "m-Q2_K.gguf",
    "m-Q4_0.gguf",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-Q8_0-00001-of-00003.gguf",
    "m-Q8_0-00003-of-00003.gguf",
    "m-UD-Q4_K_XL.gguf",
]
JS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
    "onnx/decoder_model.onnx",
    "onnx/embed_tokens.onnx",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "onnx/model_fp16.onnx",
    "onnx/model_q4.onnx",
    "onnx/model_q4.onnx_data",
    "onnx/model_q4f16.onnx",
    "onnx/model_quantized.onnx",
    "onnx/vision_encoder_q4.onnx",
]
GENAI = [
    f"{folder}/{name}"
    for folder in ("cpu/cpu-int4-rtn-block-32", "cuda/cuda-fp16", "cuda/cuda-int4-rtn-block-32")
    for name in ("genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json")
]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf.co/a/b", HubName("a/b")),
        ("HF.co/a/b:q4_k_m", HubName("a/b", "q4_k_m")),
        ("https://huggingface.co/a/b-GGUF/", HubName("a/b-GGUF")),
        ("huggingface.co/a/b/x/y.gguf", HubName("a/b", path="x/y.gguf")),
        (
            "https://hf.co/a/b/resolve/main/y%20z.gguf?download=true",
            HubName("a/b", path="y z.gguf"),
        ),
        (f"hf.co/a/b/tree/{COMMIT}/onnx", HubName("a/b", path="onnx", revision=COMMIT)),
        ("https://huggingface.co/a/b/blob/v2/y.gguf#top", HubName("a/b", "", "y.gguf", "v2")),
    ],
)
def test_names(text: str, name: HubName) -> None:
    assert is_hub_name(text)
    assert parse_hub_name(text) == name
    assert parse_hub_name(str(name)) == name  # as it is shown it may be typed


@pytest.mark.parametrize(
    "text",
    [
        "hf.co/a",
        "hf.co/../b",
        "hf.co/a/..",
        "hf.co/a/b--c",
        "hf.co/a/b/../../c",
        "hf.co/a/b/..%2f..%2fc",
        "hf.co/a/b%2fc",
        "hf.co/a/b:Q4/../x",
        "hf.co/a/b:",
        "hf.co/a/b/y.gguf:Q4_0",
        "hf.co/a/b\n",
        "hf.co/a/b/tree/..%2fx/y",
        "hf.co/a/b/x\\y",
        "hf.co//b",
        "hf.co/a b/c",
    ],
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"hf\.co/USER/REPO"):
        parse_hub_name(text)


@pytest.mark.parametrize("text", ["hf.com/a/b", "evil.org/hf.co/a/b", "https://evil.org/a/b"])
def test_other_hosts_are_not_the_hub(text: str) -> None:
    assert not is_hub_name(text)


@pytest.mark.parametrize(
    "path", ["/x", "../x", "a//b", "a/./b", "a\x00b", "a\nb", "", "C:x", "a\\b"]
)
def test_no_path_of_a_repository_leads_out_of_it(path: str) -> None:
    assert not is_repo_path(path)


@pytest.mark.parametrize(
    ("paths", "asked", "files"),
    [
        (GGUFS, "", ("m-Q4_K_M.gguf",)),
        (GGUFS, "q4_k_s", ("m-Q4_K_S.gguf",)),
        (GGUFS, "iq4_xs", ("m-IQ4_XS.gguf",)),
        (GGUFS, "UD-Q4_K_XL", ("m-UD-Q4_K_XL.gguf",)),
        (GGUFS, "bf16", tuple(GGUFS[3:5])),
        ([p for p in GGUFS if "Q4_K_M" not in p], "", ("m-Q4_0.gguf",)),
        ([p for p in GGUFS if "Q4" not in p], "", tuple(GGUFS[3:5])),
        (["a-Q8_0.gguf", "b-f16.gguf"], "", ("a-Q8_0.gguf",)),
        (["Q5_K_M/a.gguf", "Q8_0/a.gguf"], "Q8_0", ("Q8_0/a.gguf",)),
        (["plain.gguf"], "", ("plain.gguf",)),
    ],
)
def test_which_gguf(paths: list[str], asked: str, files: tuple[str, ...]) -> None:
    assert choose(reversed(paths), HubName("a/b", asked)).files == files


@pytest.mark.parametrize(
    ("path", "files"),
    [
        ("m-Q2_K.gguf", ("m-Q2_K.gguf",)),
        ("m-BF16/m-BF16-00002-of-00002.gguf", tuple(GGUFS[3:5])),
        ("m-BF16", tuple(GGUFS[3:5])),
        ("mmproj-model-f16.gguf", ("mmproj-model-f16.gguf",)),  # it says itself what it is
    ],
)
def test_a_file_that_is_named(path: str, files: tuple[str, ...]) -> None:
    assert choose(GGUFS, HubName("a/b", path=path)).files == files


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (HubName("a/b", "Q3_K"), r"no Q3_K\. It has: BF16, IQ4_XS, Q2_K, Q4_0, Q4_K_M"),
        (HubName("a/b", "Q8_0"), "no Q8_0"),  # a part of it is missing
        (HubName("a/b", "Q4_K"), "no Q4_K"),
        (HubName("a/b", path="m-Q8_0-00001-of-00003.gguf"), "no model"),
        (HubName("a/b", path="other.gguf"), "no file other.gguf"),
    ],
)
def test_what_is_not_there(name: HubName, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose(GGUFS, name)


@pytest.mark.parametrize(
    ("paths", "asked", "graph"),
    [
        (JS, "", "onnx/model_q4.onnx"),
        (JS, "q4f16", "onnx/model_q4f16.onnx"),
        (JS, "FP16", "onnx/model_fp16.onnx"),
        (JS, "quantized", "onnx/model_quantized.onnx"),
        (GENAI, "", "cpu/cpu-int4-rtn-block-32/model.onnx"),
        (GENAI, "cuda-fp16", "cuda/cuda-fp16/model.onnx"),
        ([p for p in JS if "q4" not in p], "", "onnx/model_quantized.onnx"),
    ],
)
def test_which_graph(paths: list[str], asked: str, graph: str) -> None:
    choice = choose(paths, HubName("a/b", asked))
    assert choice.onnx
    assert choice.files[0] == graph
    beside = {path.rpartition("/")[2] for path in choice.files[1:]}
    assert "tokenizer.json" in beside
    assert "training.json" not in beside
    assert all(path in paths for path in choice.files)


def test_a_graph_that_is_named_and_its_weights() -> None:
    choice = choose(JS, HubName("a/b", path="onnx/model.onnx"))
    assert choice.files[0] == "onnx/model.onnx"
    assert data_guess("onnx/model.onnx", JS) == ["onnx/model.onnx_data"]
    assert choose(GENAI, HubName("a/b", path="cuda/cuda-fp16")).files[0].startswith("cuda/cuda-fp")


def test_gguf_goes_before_onnx() -> None:
    assert choose([*JS, "m-Q8_0.gguf"], HubName("a/b")).files == ("m-Q8_0.gguf",)


def test_a_repository_without_a_model() -> None:
    with pytest.raises(UsageError, match="no GGUF file"):
        choose(["README.md", "model.safetensors", "onnx/encoder_model.onnx"], HubName("a/b"))
