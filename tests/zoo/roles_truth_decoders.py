# ruff: noqa: E501
"""The truth of language models that only decode, read from the sources of transformers 5."""

from __future__ import annotations

from tests.zoo.roles_models import GPT2, MLA, PLAIN, hf, lm, text
from tests.zoo.roles_truth import truths
from tests.zoo.roles_truth_language import BART, EAGER, no

LLAMA = """
    model.embed_tokens = embedding
    *.self_attn.q_proj = q
    *.self_attn.k_proj = k
    *.self_attn.v_proj = v
    *.self_attn.o_proj = o
    *.mlp.gate_proj = gate
    *.mlp.up_proj = up
    *.mlp.down_proj = down
    lm_head = head
"""

ATTENTION = """
    *.self_attn.q_proj = q
    *.self_attn.k_proj = k
    *.self_attn.v_proj = v
    *.self_attn.o_proj = o
    lm_head = head
    model.embed_tokens = embedding
"""

EXPERTS = """
    *.mlp.gate = router
    *.mlp.experts.gate_up_proj = gate[0:24] up[24:48]
    *.mlp.experts.down_proj = down
    ? *.shared_expert*.gate_proj = gate
    ? *.shared_expert*.up_proj = up
    ? *.shared_expert*.down_proj = down
"""

NEOX = """
    gpt_neox*.embed_in = embedding
    *.attention.query_key_value = q[0:8/24] k[8:16/24] v[16:24/24]
    *.attention.dense = o
    *.mlp.dense_h_to_4h = up
    *.mlp.dense_4h_to_h = down
    lm_head = head
    embed_out = head
"""

BLOOM = """
    transformer.word_embeddings = embedding head      # tied
    *.self_attention.query_key_value = {}
    *.self_attention.dense = o
    *.mlp.dense_h_to_4h = up
    *.mlp.dense_4h_to_h = down
"""

GPT = """
    transformer.wte = embedding {}
    transformer.wpe = embedding
    *.attn*.c_attn = {}
    *.attn*.k_proj = k
    *.attn*.v_proj = v
    *.attn*.q_proj = q
    *.attn.c_proj = o
    *.attn*.out_proj = o
    *.mlp.c_fc = up
    *.mlp.fc_in = up
    *.mlp.c_proj = down
    *.mlp.fc_out = down
    lm_head = head
"""

MLA_TEXT = (
    ATTENTION.replace("*.self_attn.q_proj = q", "*.q_b_proj = q")
    .replace(
        "*.self_attn.k_proj = k", "*.kv_a_proj_with_mqa = k[16:20]      # the rotary part, shared by heads"
    )
    .replace("*.self_attn.v_proj = v", "*.kv_b_proj = k[0:8/14] v[8:14/14]")
    + EXPERTS
    + """
    *.mlp.gate_proj = gate
    *.mlp.up_proj = up
    *.mlp.down_proj = down
    """
)

TABLE = {
    "gpt2 (Conv1D)": (
        hf("GPT2LMHeadModel", "GPT2Config", text, **GPT2, **EAGER),
        no(GPT, "*.attn*.k_", "*.attn*.v_", "*.attn*.q_", "*.attn*.out", "*.mlp.fc_", "lm_head")
        .format("head", "q[0:32] k[32:64] v[64:96]"),
    ),
    "gpt_neo": (
        hf("GPTNeoForCausalLM", "GPTNeoConfig", text, **PLAIN, num_layers=2, num_heads=4,
           attention_types=[[["global", "local"], 1]]),
        no(GPT, "*.attn*.c_attn", "*.attn.c_", "*.mlp.fc_", "lm_head").format("head"),
    ),
    "gptj": (
        hf("GPTJForCausalLM", "GPTJConfig", text, **GPT2, rotary_dim=4),
        no(GPT, "transformer.wpe", "*.attn*.c_attn", "*.attn.c_", "*.mlp.c_").format(""),
    ),
    "codegen (q, v, k by partition)": (
        hf("CodeGenForCausalLM", "CodeGenConfig", text, **GPT2, rotary_dim=4),
        no(GPT, "transformer.wpe", "*.attn*.c_attn", "*.attn.c_", "*.attn*.k_", "*.attn*.v_", "*.attn*.q_", "*.mlp.c_")
        .format("") + "\n *.attn.qkv_proj = q[0:8/24] v[8:16/24] k[16:24/24]",
    ),
    "gpt_bigcode (multi-query)": (
        hf("GPTBigCodeForCausalLM", "GPTBigCodeConfig", text, **GPT2, n_positions=64, multi_query=True),
        no(GPT, "*.attn*.k_", "*.attn*.v_", "*.attn*.q_", "*.attn*.out", "*.mlp.fc_", "lm_head")
        .format("head", "q[0:32] k[32:40] v[40:48]"),
    ),
    "gpt_bigcode (by head)": (
        hf("GPTBigCodeForCausalLM", "GPTBigCodeConfig", text, **GPT2, n_positions=64, multi_query=False, **EAGER),
        no(GPT, "*.attn*.k_", "*.attn*.v_", "*.attn*.q_", "*.attn*.out", "*.mlp.fc_", "lm_head")
        .format("head", "q[0:8/24] k[8:16/24] v[16:24/24]"),
    ),
    "gpt_neox (by head)": (hf("GPTNeoXForCausalLM", "GPTNeoXConfig", text, **PLAIN), no(NEOX, "embed_out")),
    "gpt_neox_japanese": (
        hf("GPTNeoXJapaneseForCausalLM", "GPTNeoXJapaneseConfig", text, **PLAIN),
        no(NEOX, "lm_head", "embed_out", "gpt_neox*") + "\n gpt_neox_japanese.embed_in = embedding head",
    ),
    "bloom (by head)": (
        hf("BloomForCausalLM", "BloomConfig", text, vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
        BLOOM.format("q[0:8/24] k[8:16/24] v[16:24/24]"),
    ),
    "falcon (multi-query)": (
        hf("FalconForCausalLM", "FalconConfig", text, **PLAIN, new_decoder_architecture=False, multi_query=True),
        BLOOM.format("q[0:32] k[32:40] v[40:48]"),
    ),
    "falcon (groups, interleaved)": (
        hf("FalconForCausalLM", "FalconConfig", text, **PLAIN, new_decoder_architecture=True, num_kv_heads=2),
        BLOOM.format("q[0:16/32] k[16:24/32] v[24:32/32]"),
    ),
    "mpt": (
        hf("MptForCausalLM", "MptConfig", text, vocab_size=99, d_model=32, n_heads=4, n_layers=2, expansion_ratio=2),
        """
        transformer.wte = embedding head
        *.attn.Wqkv = q[0:32] k[32:64] v[64:96]
        *.attn.out_proj = o
        *.ffn.up_proj = up
        *.ffn.down_proj = down
        """,
    ),
    "opt": (
        hf("OPTForCausalLM", "OPTConfig", text, **PLAIN, ffn_dim=48, word_embed_proj_dim=16),
        no(BART, "cross", "*.shared") + "\n model.decoder.embed_tokens = embedding head",
    ),
    "llama": (lm("Llama"), LLAMA),
    "llama, eager": (lm("Llama", **EAGER), LLAMA),
    "mistral": (lm("Mistral"), LLAMA),
    "qwen2": (lm("Qwen2"), LLAMA),
    "qwen3 (normalised q and k)": (lm("Qwen3", head_dim=8), LLAMA),
    "olmo2": (lm("Olmo2"), LLAMA),
    "cohere (parallel)": (
        lm("Cohere"), no(LLAMA, "model.embed", "lm_head") + "\n model.embed_tokens = embedding head"
    ),
    "gemma2 (capped scores)": (
        lm("Gemma2", head_dim=8, **EAGER),
        no(LLAMA, "model.embed", "lm_head") + "\n model.embed_tokens = embedding head",
    ),
    "phi": (
        lm("Phi"),
        no(LLAMA, "*.mlp", "*.self_attn.o_proj")
        + "\n *.self_attn.dense = o\n *.mlp.fc1 = up\n *.mlp.fc2 = down",
    ),
    "phi3 (fused, grouped)": (
        lm("Phi3"),
        no(LLAMA, "*.mlp", "*.self_attn.[qkv]", "*.self_attn.q", "*.self_attn.k", "*.self_attn.v")
        + """
        *.qkv_proj = q[0:32] k[32:48] v[48:64]
        *.gate_up_proj = gate[0:48] up[48:96]
        *.down_proj = down
        """,
    ),
    "glm (fused gate)": (
        lm("Glm", head_dim=8),
        no(LLAMA, "*.mlp") + "\n *.gate_up_proj = gate[0:48] up[48:96]\n *.down_proj = down",
    ),
    "starcoder2": (lm("Starcoder2"), no(LLAMA, "*.mlp", "model.embed", "lm_head") + """
        *.mlp.c_fc = up
        *.mlp.c_proj = down
        model.embed_tokens = embedding head
        """),
    "persimmon (by head)": (
        hf("PersimmonForCausalLM", "PersimmonConfig", text, **PLAIN),
        NEOX.replace("gpt_neox*.embed_in", "model.embed_tokens").replace(".attention.", ".self_attn.")
        .replace("    embed_out = head\n", ""),
    ),
    "stablelm": (lm("StableLm"), LLAMA),
    "mixtral": (lm("Mixtral", num_local_experts=4), ATTENTION + """
        *.mlp.gate = router
        *.mlp.experts.gate_up_proj = gate[0:48] up[48:96]
        *.mlp.experts.down_proj = down
        """),
    "olmoe": (lm("Olmoe", num_experts=4, num_experts_per_tok=2), ATTENTION + """
        *.mlp.gate = router
        *.mlp.experts.gate_up_proj = gate[0:48] up[48:96]
        *.mlp.experts.down_proj = down
        """),
    "qwen2_moe": (
        lm("Qwen2Moe", num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40,
           num_experts_per_tok=2),
        ATTENTION + EXPERTS,
    ),
    "qwen3_moe": (
        lm("Qwen3Moe", num_experts=4, moe_intermediate_size=24, num_experts_per_tok=2, head_dim=8),
        ATTENTION + EXPERTS,
    ),
    "gpt_oss (sinks, interleaved experts)": (
        lm("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8),
        ATTENTION
        + """
        *.mlp.router = router
        *.mlp.experts.gate_up_proj = gate[0:1/2] up[1:2/2]
        *.mlp.experts.down_proj = down
        """,
    ),
    "deepseek_v2 (latent attention)": (
        hf("DeepseekV2ForCausalLM", "DeepseekV2Config", text, **MLA, topk_method="greedy"), MLA_TEXT
    ),
    "deepseek_v3 (latent attention)": (
        hf("DeepseekV3ForCausalLM", "DeepseekV3Config", text, **MLA), MLA_TEXT
    ),
    "llama4 (experts on scaled inputs)": (
        hf("Llama4ForCausalLM", "Llama4TextConfig", text, **PLAIN, num_key_value_heads=2, head_dim=8,
           intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1),
        ATTENTION
        + """
        *.experts.gate_up_proj = gate[0:48] up[48:96]
        *.experts.down_proj = down
        *.router = router
        *.shared_expert.gate_proj = gate
        *.shared_expert.up_proj = up
        *.shared_expert.down_proj = down
        """,
    ),
    "jetmoe (experts of attention)": (
        lm("JetMoe", kv_channels=8, num_local_experts=4),
        """
        model.embed_tokens = embedding head
        *.mlp.input_linear = gate[0:48] up[48:96]
        *.mlp.output_linear = down
        *.router.layer = router
        *.self_attention.experts.input_linear = q
        *.self_attention.experts.output_linear = o
        *.self_attention.kv_proj = k[0:16] v[16:32]
        """,
    ),
    "jamba (hybrid)": (
        lm("Jamba", num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
           expert_layer_offset=1, use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4),
        ATTENTION
        + """
        *.feed_forward.router = router
        *.feed_forward.experts.gate_up_proj = gate[0:48] up[48:96]
        *.feed_forward.experts.down_proj = down
        *.feed_forward.gate_proj = gate
        *.feed_forward.up_proj = up
        *.feed_forward.down_proj = down
        """,
    ),
    "qwen3_next (gated and linear attention)": (
        lm("Qwen3Next", head_dim=8, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24,
           num_experts_per_tok=2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
           linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"]),
        ATTENTION.replace("*.self_attn.q_proj = q", "*.self_attn.q_proj = q[0:8/16]      # then the gate")
        + EXPERTS,
    ),
    "recurrent_gemma (hybrid)": (
        hf("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", text, **{**PLAIN, "num_hidden_layers": 3},
           num_key_value_heads=1, lru_width=32, attention_window_size=8),
        """
        model.embed_tokens = embedding head
        *.temporal_block.q_proj = q
        *.temporal_block.k_proj = k
        *.temporal_block.v_proj = v
        *.temporal_block.o_proj = o
        *.mlp_block.gate_proj = gate
        *.mlp_block.up_proj = up
        *.mlp_block.down_proj = down
        """,
    ),
    "mamba (no attention)": (
        hf("MambaForCausalLM", "MambaConfig", text, vocab_size=99, hidden_size=32, num_hidden_layers=2,
           state_size=4, time_step_rank=4),
        "backbone.embeddings = embedding head",
    ),
    "rwkv (linear attention)": (
        hf("RwkvForCausalLM", "RwkvConfig", text, vocab_size=99, hidden_size=32, num_hidden_layers=2,
           attention_hidden_size=32, intermediate_size=48),
        """
        rwkv.embeddings = embedding
        *.feed_forward.key = up
        *.feed_forward.value = down
        head = head
        """,
    ),
}  # fmt: skip

TRUTHS = truths(TABLE)
