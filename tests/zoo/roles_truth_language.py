# ruff: noqa: E501
"""The truth of language models that encode, read from the sources of transformers 5."""

from __future__ import annotations

import torch

from tests.zoo.roles_models import PLAIN, T5, TWO_SIDED, hf, ids, pair, text
from tests.zoo.roles_truth import truths

EAGER = {"attn_implementation": "eager"}

BERT = """
    *embeddings.*_embeddings = embedding
    *.attention.self.query = q
    *.attention.self.key = k
    *.attention.self.value = v
    *.attention.output.dense = o
    *.intermediate.dense = up
    *.output.dense = down
    *pooler.dense = head
"""
T5_TEXT = """
    shared = embedding head
    *.relative_attention_bias = embedding
    *Attention.q = q
    *Attention.k = k
    *Attention.v = v
    *Attention.o = o
    *.mlp.router.classifier = router
    *.wi = up
    *.wi_0 = gate
    *.wi_1 = up
    *.wo = down
    cross *.EncDecAttention.[qkv]
    position *.relative_attention_bias
"""
BART = """
    *.shared = embedding head
    *embed_positions = embedding
    *.k_proj = k
    *.v_proj = v
    *.q_proj = q
    *.out_proj = o
    *.fc1 = up
    *.fc2 = down
    cross *.encoder_attn.[kvq]_proj
"""
LONG = BERT.replace("*.attention.self.query =", "*.*_global = -\n    *.attention.self.query =")


def no(text: str, *lines: str) -> str:
    """Return a text without the lines that hold for other members of its family."""
    kept = [line for line in text.splitlines() if not any(line.strip().startswith(left) for left in lines)]
    return "\n".join(kept)


TABLE = {
    "bert": (hf("BertModel", "BertConfig", text, **PLAIN), BERT),
    "bert, eager, classifier": (
        hf("BertForSequenceClassification", "BertConfig", text, **PLAIN, **EAGER),
        no(BERT, "*pooler") + "\n classifier = head",
    ),
    "electra": (
        hf("ElectraForPreTraining", "ElectraConfig", text, **PLAIN, embedding_size=16),
        no(BERT, "*pooler") + "\n *.dense_prediction = head",
    ),
    "rembert": (hf("RemBertModel", "RemBertConfig", text, **PLAIN, input_embedding_size=16), BERT),
    "distilbert": (
        hf("DistilBertModel", "DistilBertConfig", text, vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
        """
        embeddings.*_embeddings = embedding
        *.q_lin = q
        *.k_lin = k
        *.v_lin = v
        *.out_lin = o
        *.ffn.lin1 = up
        *.ffn.lin2 = down
        """,
    ),
    "albert": (
        hf("AlbertModel", "AlbertConfig", text, **PLAIN, embedding_size=16),
        """
        embeddings.*_embeddings = embedding
        *.attention.query = q
        *.attention.key = k
        *.attention.value = v
        *.attention.dense = o
        *.ffn = up
        *.ffn_output = down
        pooler = head
        """,
    ),
    "deberta": (
        hf("DebertaModel", "DebertaConfig", text, **PLAIN, relative_attention=True,
           pos_att_type=["c2p", "p2c"], position_biased_input=False),
        no(BERT, "*.attention.self", "*pooler")
        + """
        *.in_proj = q[0:8/24] k[8:16/24] v[16:24/24]
        position *.pos_proj
        position *.pos_q_proj
        """,
    ),
    "deberta-v2": (
        hf("DebertaV2Model", "DebertaV2Config", text, **PLAIN, relative_attention=True,
           pos_att_type=["c2p", "p2c"], position_buckets=8, share_att_key=False),
        no(BERT, "*.attention.self", "*pooler")
        + """
        *.self.query_proj = q
        *.self.key_proj = k
        *.self.value_proj = v
        position *.pos_key_proj
        position *.pos_query_proj
        """,
    ),
    "deberta-v2, shared keys": (
        hf("DebertaV2Model", "DebertaV2Config", text, **PLAIN, relative_attention=True,
           pos_att_type=["c2p", "p2c"], position_buckets=8, share_att_key=True),
        no(BERT, "*.attention.self", "*pooler")
        + """
        *.self.query_proj = q
        *.self.key_proj = k
        *.self.value_proj = v
        position *.self.query_proj      # used again, on the positions
        position *.self.key_proj
        """,
    ),
    "xlnet": (
        hf("XLNetModel", "XLNetConfig", text, vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48),
        """
        word_embedding = embedding
        *.rel_attn.q = q
        *.rel_attn.k = k
        *.rel_attn.v = v
        *.rel_attn.o = o
        *.ff.layer_1 = up
        *.ff.layer_2 = down
        position *.rel_attn.r
        """,
    ),
    "funnel": (
        hf("FunnelModel", "FunnelConfig", text, vocab_size=99, block_sizes=[1, 1], num_decoder_layers=1,
           d_model=32, n_head=4, d_head=8, d_inner=48),
        """
        embeddings.word_embeddings = embedding
        *.q_head = q
        *.k_head = k
        *.v_head = v
        *.post_proj = o
        *.ffn.linear_1 = up
        *.ffn.linear_2 = down
        position *.r_kernel
        """,
    ),
    "xlm": (
        hf("XLMModel", "XLMConfig", text, vocab_size=99, emb_dim=32, n_layers=2, n_heads=4),
        """
        *embeddings = embedding
        *.q_lin = q
        *.k_lin = k
        *.v_lin = v
        *.out_lin = o
        *.lin1 = up
        *.lin2 = down
        """,
    ),
    "longformer": (
        hf("LongformerModel", "LongformerConfig", text, **PLAIN, attention_window=4), LONG
    ),
    "longformer, global attention": (
        hf("LongformerModel", "LongformerConfig",
           lambda: {"input_ids": ids(), "global_attention_mask": torch.eye(8)[:1].repeat(2, 1).long()},
           **PLAIN, attention_window=4),
        BERT + """
        *.self.query_global = q
        *.self.key_global = k
        *.self.value_global = v
        """,
    ),
    "big_bird": (
        hf("BigBirdModel", "BigBirdConfig", lambda: {"input_ids": ids(1, 64)},
           **{**PLAIN, "max_position_embeddings": 128}, attention_type="block_sparse", block_size=4,
           num_random_blocks=2),
        BERT.replace("*pooler.dense", "pooler"),
    ),
    "nystromformer": (
        hf("NystromformerModel", "NystromformerConfig", lambda: {"input_ids": ids(2, 16)}, **PLAIN,
           num_landmarks=4, segment_means_seq_len=16, conv_kernel_size=3),
        no(BERT, "*pooler"),
    ),
    "mobilebert": (
        hf("MobileBertModel", "MobileBertConfig", text, **PLAIN, true_hidden_size=16,
           intra_bottleneck_size=16, embedding_size=16),
        BERT.replace("*.output.dense = down", "*.output.bottleneck.dense = -\n    *.output.dense = down"),
    ),
    "squeezebert (convolutions)": (
        hf("SqueezeBertModel", "SqueezeBertConfig", text, **PLAIN, embedding_size=32, q_groups=2, k_groups=2,
           v_groups=2, post_attention_groups=1, intermediate_groups=2, output_groups=2),
        """
        embeddings.*_embeddings = embedding
        *.attention.query = q
        *.attention.key = k
        *.attention.value = v
        *.post_attention.conv1d = o
        *.intermediate.conv1d = up
        *.output.conv1d = down
        pooler.dense = head
        """,
    ),
    "convbert": (
        hf("ConvBertModel", "ConvBertConfig", text, **PLAIN, embedding_size=32, head_ratio=2, conv_kernel_size=3),
        no(BERT, "*pooler"),
    ),
    "reformer (local and lsh)": (
        hf("ReformerModel", "ReformerConfig", lambda: {"input_ids": ids(2, 16)}, vocab_size=99, hidden_size=32,
           num_attention_heads=2, attention_head_size=16, feed_forward_size=48, attn_layers=["local", "lsh"],
           axial_pos_shape=(4, 4), axial_pos_embds_dim=(16, 16), local_attn_chunk_length=4,
           lsh_attn_chunk_length=4, num_buckets=2, is_decoder=False, max_position_embeddings=64),
        """
        embeddings.word_embeddings = embedding
        *.self_attention.query = q
        *.self_attention.key = k
        *.self_attention.query_key = q k
        *.self_attention.value = v
        *.attention.output.dense = o
        *.feed_forward.dense.dense = up
        *.feed_forward.output.dense = down
        """,
    ),
    "modernbert": (
        hf("ModernBertModel", "ModernBertConfig", text, **PLAIN, local_attention=4),
        """
        embeddings.tok_embeddings = embedding
        *.attn.Wqkv = q[0:32] k[32:64] v[64:96]
        *.attn.Wo = o
        *.mlp.Wi = gate[0:48] up[48:96]
        *.mlp.Wo = down
        """,
    ),
    "fnet (no attention)": (
        hf("FNetModel", "FNetConfig", text, **PLAIN),
        """
        embeddings.*_embeddings = embedding
        *.intermediate.dense = up
        *.output.dense = down
        pooler.dense = head
        """,
    ),
    "t5": (hf("T5ForConditionalGeneration", "T5Config", pair, **T5), no(T5_TEXT, "*.wi_", "*.mlp")),
    "t5 (gated, untied)": (
        hf("T5ForConditionalGeneration", "T5Config", pair, **T5, feed_forward_proj="gated-gelu",
           tie_word_embeddings=False, **EAGER),
        no(T5_TEXT, "*.wi =", "*.mlp", "shared") + "\n shared = embedding head",
    ),
    "switch_transformers": (
        hf("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", pair, **T5, num_experts=4,
           num_decoder_layers=2, expert_capacity=16, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
        no(T5_TEXT, "*.wi_"),
    ),
    "bart": (hf("BartForConditionalGeneration", "BartConfig", pair, **TWO_SIDED), BART),
    "led": (
        hf("LEDForConditionalGeneration", "LEDConfig", pair, **TWO_SIDED, attention_window=[4, 4],
           max_encoder_position_embeddings=64, max_decoder_position_embeddings=64),
        BART + """
        *.longformer_self_attn.query = q
        *.longformer_self_attn.key = k
        *.longformer_self_attn.value = v
        *.self_attn.output = o
        """,
    ),
    "prophetnet": (
        hf("ProphetNetModel", "ProphetNetConfig", pair, vocab_size=99, hidden_size=32, num_encoder_layers=2,
           num_decoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4,
           encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, ngram=2),
        """
        *embeddings = embedding
        *.relative_pos_embeddings = -
        *.query_proj = q
        *.key_proj = k
        *.value_proj = v
        *.out_proj = o
        *.feed_forward.intermediate = up
        *.feed_forward.output = down
        cross *.cross_attn.*_proj
        """.replace("cross *.cross_attn.*_proj", "cross *.cross_attn.[qkv]*_proj")
        .replace("*embeddings = embedding\n        *.relative_pos_embeddings = -",
                 "*.relative_pos_embeddings = -\n        *.ngram_embeddings = -      # added, never looked up\n"
                 "        *embeddings = embedding"),
    ),
}  # fmt: skip

TRUTHS = truths(TABLE)
