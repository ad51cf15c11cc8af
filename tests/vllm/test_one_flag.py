"""``--load-format layerskip`` is enough; unsupported options are refused by name before a process is started."""

from __future__ import annotations

import subprocess
import sys

import pytest

from .engines import engine, generate, runner
from .models import prompts, write_model

OUR_OPTIONS = "model_loader_extra_config"


def speculation(model, **options):
    """The speculative configuration of an engine with these arguments."""
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model=str(model), load_format="layerskip", **options)
    return args.create_engine_config().speculative_config


def test_exit_layer_and_drafts_come_from_the_model(tmp_path):
    write_model(tmp_path, layerskip={"exit_layer": 3, "num_speculations": 2})
    with engine(tmp_path, load_format="layerskip") as llm:
        assert runner(llm).drafter.num_speculative_tokens == 2
        assert len(runner(llm).drafter.model.inner.layers) == 3
        generate(llm, prompts(5))
        assert llm.drafts.accepted > 0


def test_what_the_user_says_goes_first(model):
    assert speculation(model).num_speculative_tokens == 4
    assert speculation(model, spec_tokens=7).num_speculative_tokens == 7
    assert speculation(model, **{OUR_OPTIONS: {"num_speculations": 3}}).num_speculative_tokens == 3
    given = speculation(model, speculative_config={"num_speculative_tokens": 2, "use-local-argmax-reduction": False})
    assert given.num_speculative_tokens == 2
    assert not given.use_local_argmax_reduction
    assert not speculation(
        model, speculative_config={"draft_sample_method": "probabilistic"}
    ).use_local_argmax_reduction


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({OUR_OPTIONS: {"exit_layer": 4}}, r"exit_layer must be in 1 … 3.* got 4"),
        ({OUR_OPTIONS: {"num_speculations": 2}, "spec_tokens": 3}, r"name the same thing; give one"),
        ({"spec_method": "ngram"}, r"not by 'ngram': vLLM takes one method"),
        ({"speculative_config": {"model": "elsewhere"}}, r"itself, not with elsewhere"),
        (
            {"speculative_config": {"kv_cache_dtype": "fp8", "quantization": "fp8"}},
            r"hold kv_cache_dtype, quantization",
        ),
        ({OUR_OPTIONS: {"exit": "./nowhere"}}, r"no exit at nowhere/exit.safetensors"),
        ({"enable_lora": True}, r"does not support LoRA at run time; merge the adapter"),
        ({"pipeline_parallel_size": 2}, r"does not support pipeline parallelism"),
        ({"kv_sharing_fast_prefill": True}, r"does not support --kv-sharing-fast-prefill"),
    ],
)
def test_refused_by_name(options, message, model):
    with pytest.raises((ValueError, NotImplementedError, FileNotFoundError), match=message):
        speculation(model, **options)


def test_an_unknown_option_is_vllms_to_refuse(model):
    with (
        pytest.raises(ValueError, match="exit_block"),
        engine(model, load_format="layerskip", **{OUR_OPTIONS: {"exit_block": "dir"}}),
    ):
        pass


def test_other_architectures_are_refused_by_name(tmp_path):
    write_model(tmp_path, "Granite")
    with pytest.raises(NotImplementedError, match=r"does not support architecture GraniteForCausalLM; it knows Llama"):
        speculation(tmp_path)


def test_a_sliding_window_is_refused(tmp_path):
    write_model(tmp_path, "Mistral", sliding_window=32)
    with pytest.raises(NotImplementedError, match="does not support a sliding window"):
        speculation(tmp_path)
    assert speculation(tmp_path, disable_sliding_window=True) is not None


def test_other_engines_are_left_alone(model):
    from vllm.engine.arg_utils import EngineArgs

    assert EngineArgs(model=str(model)).create_engine_config().speculative_config is None


def test_an_unsupported_vllm_is_refused_only_where_the_format_is_used(model):
    code = f"""
import vllm
vllm.__version__ = "0.33.0"
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
for load_format in ("auto", "layerskip"):
    config = EngineArgs(model={str(model)!r}, load_format=load_format).create_engine_config()
    print(load_format)
    get_model_loader(config.load_config)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["auto", "layerskip"]
    assert "NotImplementedError: --load-format layerskip knows the internals of vLLM >=0.32,<0.33" in done.stderr


def test_the_plugin_costs_other_processes_nothing(model):
    """vLLM calls `register` in each process: only the plugin and the quantizer for transformers may be imported."""
    code = f"""
import sys
from vllm.engine.arg_utils import EngineArgs
EngineArgs(model={str(model)!r}).create_engine_config()
print(sorted(name for name in sys.modules if name.startswith("layerskip")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    package = ["layerskip", "layerskip._imports", "layerskip._registration", "layerskip.registry"]
    package += ["layerskip.transformers", "layerskip.transformers.quantizer"]
    plugin = ["layerskip.vllm", "layerskip.vllm.engine", "layerskip.vllm.loader", "layerskip.vllm.settings"]
    assert done.stdout.splitlines()[-1] == str(package + plugin)


def test_importing_the_library_imports_no_vllm():
    code = "import sys, layerskip, layerskip.vllm, layerskip.vllm.settings; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
