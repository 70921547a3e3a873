"""Activations that a walk over modules cannot see: each becomes a site, and the one that runs, here and reloaded."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

import orthoact
from orthoact import Activation, OrthoactError
from orthoact.convert.audit import probe_batch
from orthoact.convert.calls import Shared

BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 96}


def esm():
    config = tf.EsmConfig(
        **{**BERT, "vocab_size": 33}, pad_token_id=1, mask_token_id=32, position_embedding_type="rotary"
    )
    return tf.EsmForMaskedLM(config)


def whisper():
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 96, "num_mel_bins": 8}
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**sizes, **layers, **ends, max_source_positions=16))


def deberta():
    return tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**BERT, relative_attention=False))


def distilbert():
    config = tf.DistilBertConfig(vocab_size=96, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    return tf.DistilBertForSequenceClassification(config)


def openai_gpt():
    return tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(vocab_size=96, n_embd=32, n_layer=3, n_head=2, n_positions=32))


def mixtral():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**BERT, **experts, bos_token_id=1, eos_token_id=2, pad_token_id=0))


OWNERS = {
    "a function of the file (ESM)": (esm, {"gelu"}, 2),
    "functions of torch in the stem (Whisper)": (whisper, {"gelu"}, 4),
    "a singleton in the head (RoBERTa)": (
        lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**BERT, pad_token_id=1)),
        {"gelu"},
        2,
    ),
    "made in each forward (DeBERTa's pooler)": (deberta, {"gelu"}, 2),
    "made on the spot (DistilBERT's head)": (distilbert, {"gelu", "relu"}, 2),
    "one object at several paths (OpenAI GPT)": (openai_gpt, {"gelu_tanh"}, 3),
    "inside experts (Mixtral)": (mixtral, {"silu"}, 1),
}


def lively(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=p[0].numel() ** -0.5)
    return model.eval()


def output(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**probe_batch(model)).logits


@pytest.mark.parametrize("how", OWNERS)
def test_every_call_is_a_site_and_the_one_that_runs(how, tmp_path):
    make, targets, count = OWNERS[how]
    model = lively(make())
    before, kinds = output(model), {name: type(m) for name, m in model.named_modules()}
    sites, left = orthoact.inspect_model(model, include_heads=True)
    assert {s.target.name for s in sites} == targets and len(sites) == count
    assert not [i for i in left if i.proper], left
    assert {name: type(m) for name, m in model.named_modules()} == kinds, "looking changes nothing"

    orthoact.convert_(model, include_heads=True, degree=12)
    after = output(model)
    assert 0 < (after - before).abs().max() < 0.1 * before.std()
    for site in sites:
        act = model.get_submodule(site.name)
        assert isinstance(act, Activation)
        act.theta.data[0] += 0.5
        assert not torch.equal(output(model), after), f"{site.name} is not what runs"
        act.theta.data[0] -= 0.5

    twin = copy.deepcopy(model)
    twin.get_submodule(sites[0].name).theta.data[0] += 0.5
    assert torch.equal(output(model), after) and not torch.equal(output(twin), after)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(type(model).from_pretrained(tmp_path)), after)
    with orthoact.original(model):
        assert torch.equal(output(model), before)
    orthoact.revert_(model)
    assert torch.equal(output(model), before)
    assert {name: type(m) for name, m in model.named_modules()} == kinds


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_of_running_experts_asks_the_activation(way):
    model = lively(mixtral())
    model.set_experts_implementation(way)
    (site,) = orthoact.convert_(model).plan.sites
    before = output(model)
    model.get_submodule(site.name).theta.data[0] += 0.5
    assert not torch.allclose(output(model), before)


def test_share_keeps_one_activation_for_one_module(tmp_path):
    model = lively(openai_gpt())
    made = orthoact.convert_(model, share=True, degree=8)
    names = [s.name for s in made.plan.sites]
    acts = [model.get_submodule(name) for name in names]
    assert len(names) == 3 and made.plan.parameters == 9 and isinstance(acts[0], Activation)
    assert all(isinstance(a, Shared) and a.activation is acts[0] for a in acts[1:])
    before = output(model)
    acts[0].theta.data[0] += 0.1
    after = output(model)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    again = tf.OpenAIGPTLMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(output(again), after)
    assert len({id(p) for n, p in again.named_parameters() if n.endswith("theta")}) == 1
    orthoact.revert_(model)
    assert not [m for m in model.modules() if isinstance(m, Activation | Shared)]
    assert orthoact.convert_(model, degree=8).plan.parameters == 27, "without it each place learns by itself"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("act", ["gelu", "relu", F.gelu, nn.GELU()], ids=str)
def test_the_fused_encoder_of_torch_runs_what_the_layer_holds(act):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation=act, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    x, hidden = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    with torch.no_grad():
        before = model(x, src_key_padding_mask=hidden)  # through the fused path and nested tensors
        names = [s.name for s in orthoact.convert_(model, degree=16).plan.sites]
        assert names == ["layers.0.activation", "layers.1.activation"]
        after = model(x, src_key_padding_mask=hidden)
        assert (after - before)[~hidden].abs().max() < 0.05
        for name in names:
            model.get_submodule(name).theta[0] += 0.5
            assert not torch.allclose(model(x, src_key_padding_mask=hidden)[~hidden], after[~hidden], atol=1e-3), name
            model.get_submodule(name).theta[0] -= 0.5
        orthoact.revert_(model)
        assert torch.equal(model(x, src_key_padding_mask=hidden), before)


class LigerSwiGLUMLP(nn.Module):
    """Named as Liger's block, whose kernel computes the activation inside; that needs a GPU."""

    def __init__(self):
        super().__init__()
        self.act_fn = nn.SiLU()


def test_blocks_that_hide_their_activation_are_refused(tmp_path):
    with pytest.raises(OrthoactError, match=r"0 runs a Liger kernel.*without Liger"):
        orthoact.plan(nn.Sequential(LigerSwiGLUMLP()))
    model = lively(openai_gpt())
    model._use_kernels = True
    with pytest.raises(OrthoactError, match=r"loaded with use_kernels.*load it without"):
        orthoact.plan(model)
    model._use_kernels = False
    orthoact.convert_(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(OrthoactError, match="use_kernels on the converted OpenAIGPTLMHeadModel"):
        tf.OpenAIGPTLMHeadModel.from_pretrained(tmp_path, use_kernels=True)


STATES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
SCANS = {
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**STATES, state_size=8)),
    "jamba": lambda: tf.JambaForCausalLM(
        tf.JambaConfig(**STATES, **HEADS, num_experts=2, mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1)
    ),
    "falcon_h1": lambda: tf.FalconH1ForCausalLM(
        tf.FalconH1Config(**STATES, **HEADS, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8)
    ),
}


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize("groups", [None, 4])
def test_the_gate_of_a_scan_is_one_site_in_prefill_and_decoding(kind, groups):
    model = lively(SCANS[kind]())
    kinds = {name: type(m) for name, m in model.named_modules()}
    ids = torch.randint(5, 96, (2, 9))

    def both():
        with torch.no_grad():
            whole = model(ids).logits[:, -1]
            return whole, model(ids[:, -1:], cache=model(ids[:, :-1]).cache).logits[:, -1]

    before = both()
    torch.testing.assert_close(*before)
    sites = [s.name for s in orthoact.convert_(model, groups=groups).plan.sites]
    gates = [n for n in sites if n.endswith("functional_silu")]
    assert gates and len([n for n in sites if n.endswith("functional_fused")]) == len(gates)
    torch.testing.assert_close(*both())
    for name in gates:
        act = model.get_submodule(name)
        with torch.no_grad():
            act.theta += 0.3 * torch.randn_like(act.theta)  # another function for each group of channels
        after = both()
        assert (after[0] - before[0]).abs().max() > 1e-4
        torch.testing.assert_close(*after)
    orthoact.revert_(model)
    assert all(torch.equal(a, b) for a, b in zip(both(), before, strict=True))
    assert {name: type(m) for name, m in model.named_modules()} == kinds


@pytest.mark.parametrize("include", ["*", "*.norm.*"])
def test_a_converted_block_is_not_trained_in_one_kernel(monkeypatch, include):
    """The kernels need a GPU; what stands here for one tells whether it is called."""
    ran = []
    monkeypatch.setattr(
        "transformers.models.falcon_h1.modeling_falcon_h1.mamba2_split_conv1d_scan_combined",
        lambda *args, **kwargs: ran.append(1),
    )
    config = tf.FalconH1Config(
        **STATES, **HEADS, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_rms_norm=True
    )
    model = lively(tf.FalconH1ForCausalLM(config)).train()
    ids = torch.randint(5, 96, (2, 9))
    model(ids, use_cache=False)
    assert len(ran) == 2
    orthoact.convert_(model, include=[include])
    model(ids, use_cache=False)
    assert len(ran) == 2
    orthoact.revert_(model)
    model(ids, use_cache=False)
    assert len(ran) == 4
