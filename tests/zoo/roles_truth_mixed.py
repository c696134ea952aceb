# ruff: noqa: E501
"""The truth of transformers' vision, speech and multimodal models, read from their sources."""

from __future__ import annotations

import torch

from tests.zoo.roles_models import PLAIN, RESNET, TWO_SIDED, WAVE, hf, ids, image, normal, text
from tests.zoo.roles_truth import truths
from tests.zoo.roles_truth_language import BERT, no

PROJECTED = """
    *.self_attn.k_proj = k
    *.self_attn.v_proj = v
    *.self_attn.q_proj = q
    *.self_attn.o*_proj = o
    ? *.encoder_attn.k_proj = k
    ? *.encoder_attn.v_proj = v
    ? *.encoder_attn.q_proj = q
    ? *.encoder_attn.o*_proj = o
    *.fc1 = up
    *.fc2 = down
"""
CROSS = "\n    cross *.encoder_attn.[kvq]*_proj\n"
VIT = """
    *patch_embeddings.projection = stem
    ? *.attention.attention.query = q
    ? *.attention.attention.key = k
    ? *.attention.attention.value = v
    ? *.attention.query = q
    ? *.attention.key = k
    ? *.attention.value = v
    ? *.attention.[q]_proj = q
    ? *.attention.[k]_proj = k
    ? *.attention.[v]_proj = v
    ? *.attention.o_proj = o
    ? *.attention.output.dense = o
    ? *.mlp.fc1 = up
    ? *.mlp.fc2 = down
    ? *.intermediate.dense = up
    ? *.output.dense = down
    classifier = head
"""
CONFORMER = """
    *.ffn*.intermediate_dense = up
    *.ffn*.output_dense = down
    *.self_attn.linear_q = q
    *.self_attn.linear_k = k
    *.self_attn.linear_v = v
    *.self_attn.linear_out = o
    *.conv_module.pointwise_conv1 = up[0:32] gate[32:64]
    *.conv_module.pointwise_conv2 = down
    position *.linear_pos
"""
WAVE_TEXT = """
    *feature_extractor.conv_layers.0.conv = stem
    *.attention.k_proj = k
    *.attention.v_proj = v
    *.attention.q_proj = q
    *.attention.out_proj = o
    *.feed_forward.intermediate_dense = up
    *.feed_forward.output_dense = down
"""
BACKBONE = "\n    model.backbone.model.embedder.embedder.convolution = stem\n"
STAGES = {"image_size": 64, "hidden_sizes": [16, 32], "num_encoder_blocks": 2, "depths": [1, 1]}

TABLE = {
    "whisper": (
        hf("WhisperModel", "WhisperConfig",
           lambda: {"input_features": normal(2, 8, 40), "decoder_input_ids": ids()}, **TWO_SIDED,
           num_mel_bins=8, max_source_positions=20, max_target_positions=20),
        """
        encoder.conv1 = stem
        decoder.embed_positions = -      # read by index, not looked up
        *embed_positions = embedding
        *embed_tokens = embedding
        """ + PROJECTED + CROSS,
    ),
    "moonshine": (
        hf("MoonshineModel", "MoonshineConfig",
           lambda: {"input_values": normal(2, 4000), "decoder_input_ids": ids()}, vocab_size=99,
           hidden_size=32, intermediate_size=48,
           **{f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in
              (("num_hidden_layers", 2), ("num_attention_heads", 4), ("num_key_value_heads", 4))}),
        "encoder.conv1 = stem\n decoder.embed_tokens = embedding\n decoder.*.fc1 = up[0:48] gate[48:96]"
        + PROJECTED + CROSS,
    ),
    "wav2vec2": (
        hf("Wav2Vec2Model", "Wav2Vec2Config", lambda: {"input_values": normal(2, 2000)}, **WAVE), WAVE_TEXT
    ),
    "wav2vec2, quantiser": (
        hf("Wav2Vec2ForPreTraining", "Wav2Vec2Config", lambda: {"input_values": normal(2, 2000)}, **WAVE,
           codevector_dim=16, proj_codevector_dim=16, num_codevectors_per_group=8),
        # It chooses code vectors, not experts: no router.
        WAVE_TEXT + "project_hid = head\n project_q = head",
    ),
    "wav2vec2 conformer (relative)": (
        hf("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", lambda: {"input_values": normal(2, 2000)},
           **WAVE, position_embeddings_type="relative"),
        "*feature_extractor.conv_layers.0.conv = stem" + CONFORMER,
    ),
    "wav2vec2 bert (relative keys)": (
        hf("Wav2Vec2BertModel", "Wav2Vec2BertConfig", lambda: {"input_features": normal(2, 20, 16)},
           **PLAIN, feature_projection_input_dim=16, position_embeddings_type="relative_key"),
        "feature_projection.projection = stem\n *.distance_embedding = embedding"
        + CONFORMER.replace("*.linear_pos", "*.distance_embedding"),
    ),
    "speecht5": (
        hf("SpeechT5ForTextToSpeech", "SpeechT5Config",
           lambda: {"input_ids": ids(), "decoder_input_values": normal(2, 6, 80),
                    "speaker_embeddings": normal(2, 16)},
           vocab_size=99, hidden_size=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
           decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, speaker_embedding_dim=16),
        PROJECTED.replace("self_attn", "*att*n")
        .replace("*.fc1 = up", "*.feed_forward.intermediate_dense = up")
        .replace("*.fc2 = down", "*.feed_forward.output_dense = down")
        + """
        *.encoder.prenet.embed_tokens = embedding
        *.embed_positions.pe_k = embedding
        *.decoder.prenet.layers.0 = stem
        speech_decoder_postnet.prob_out = -
        speech_decoder_postnet.layers.4.conv = head
        position *.embed_positions.pe_k
        """ + CROSS,
    ),
    "fastspeech2 conformer": (
        hf("FastSpeech2ConformerModel", "FastSpeech2ConformerConfig", text, vocab_size=99, hidden_size=32,
           encoder_layers=1, decoder_layers=1, encoder_num_attention_heads=2, decoder_num_attention_heads=2,
           encoder_linear_units=48, decoder_linear_units=48, num_mel_bins=8, duration_predictor_channels=8,
           energy_predictor_channels=8, pitch_predictor_channels=8, speech_decoder_postnet_units=8),
        no(CONFORMER, "*.ffn")
        + "\n encoder.embed = embedding\n speech_decoder_postnet.layers.4.conv = head",
    ),
    "musicgen decoder": (
        hf("MusicgenForCausalLM", "MusicgenDecoderConfig",
           lambda: {"input_ids": ids(4, 6)}, vocab_size=64, hidden_size=32, num_hidden_layers=2,
           num_attention_heads=4, ffn_dim=48, num_codebooks=2),
        "*.encoder_attn.* = -      # no other stream was given\n *embed_tokens.* = embedding\n lm_heads.* = head"
        + PROJECTED,
    ),
    "vit (transformers)": (
        hf("ViTForImageClassification", "ViTConfig", image, **PLAIN), VIT
    ),
    "beit (transformers)": (
        hf("BeitForImageClassification", "BeitConfig", image, **PLAIN, use_relative_position_bias=True), VIT
    ),
    "dinov2, gated": (
        hf("Dinov2Model", "Dinov2Config", image, **PLAIN, use_swiglu_ffn=True),
        no(VIT, "classifier", "? *.mlp")
        + "\n *.mlp.gate_proj = gate\n *.mlp.up_proj = up\n *.mlp.down_proj = down",
    ),
    "swin (transformers)": (
        hf("SwinForImageClassification", "SwinConfig", image, image_size=32, patch_size=4, embed_dim=16,
           depths=[2, 2], num_heads=[2, 4], window_size=4),
        VIT.replace(".attention.attention.", ".attention.self."),
    ),
    "swin v2 (transformers)": (
        hf("Swinv2ForImageClassification", "Swinv2Config", image, image_size=32, patch_size=4, embed_dim=16,
           depths=[2, 2], num_heads=[2, 4], window_size=4),
        VIT.replace(".attention.attention.", ".attention.self.")
        + "position *.continuous_position_bias_mlp.2",
    ),
    "segformer": (
        hf("SegformerForSemanticSegmentation", "SegformerConfig", lambda: image(64), num_encoder_blocks=2,
           depths=[2, 2], sr_ratios=[4, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2],
           num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16),
        no(VIT, "*patch", "classifier")
        + "\n *stages.0.patch_embeddings.proj = stem\n decode_head.classifier = head",
    ),
    "levit (by head)": (
        hf("LevitForImageClassification", "LevitConfig", lambda: image(64), image_size=64,
           hidden_sizes=[16, 32, 48], num_attention_heads=[2, 4, 6], depths=[1, 1, 1], key_dim=[8, 8, 8],
           patch_size=16, down_ops=[["Subsample", 8, 2, 2, 2, 2], ["Subsample", 8, 4, 2, 2, 2]]),
        """
        *.embedding_layer_1.convolution = stem
        *.queries_keys_values.linear = q[0:8/32] k[8:16/32] v[16:32/32]
        *.keys_values.linear = k[0:8/24] v[8:24/24]
        *.queries.linear = q
        *.projection.linear = o
        *.linear_up.linear = up
        *.linear_down.linear = down
        classifier.linear = head
        """,
    ),
    "cvt (convolutional projections)": (
        hf("CvtForImageClassification", "CvtConfig", lambda: image(64), embed_dim=[16, 32], num_heads=[1, 2],
           depth=[1, 2], patch_sizes=[7, 3], patch_stride=[4, 2], patch_padding=[2, 1], mlp_ratio=[2.0, 2.0],
           attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0], drop_path_rate=[0.0, 0.0],
           qkv_bias=[True, True], cls_token=[False, True], qkv_projection_method=["dw_bn", "dw_bn"],
           kernel_qkv=[3, 3], padding_kv=[1, 1], stride_kv=[2, 2], padding_q=[1, 1], stride_q=[1, 1]),
        """
        *.stages.0.embedding.*.projection = stem
        *.projection_query = q
        *.projection_key = k
        *.projection_value = v
        *.attention.output.dense = o
        *.intermediate.dense = up
        *.output.dense = down
        classifier = head
        """,
    ),
    "pvt": (
        hf("PvtForImageClassification", "PvtConfig", lambda: image(64), **STAGES,
           sequence_reduction_ratios=[2, 1], num_attention_heads=[1, 2], patch_sizes=[4, 2], strides=[4, 2],
           mlp_ratios=[2, 2]),
        VIT.replace("*patch_embeddings.projection", "*.patch_embeddings.0.projection")
        .replace(".attention.attention.", ".attention.self.").replace(".fc", ".dense"),
    ),
    "mobilevit": (
        hf("MobileViTForImageClassification", "MobileViTConfig", lambda: image(64), image_size=64,
           hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 16, 16, 16, 24, 24, 32], num_attention_heads=4),
        """
        mobilevit.conv_stem.convolution = stem
        mobilevit.encoder.layer.1.layer.[12].expand_1x1.convolution = up
        mobilevit.encoder.layer.1.layer.[12].reduce_1x1.convolution = down
        """ + no(VIT, "*patch"),
    ),
    "mobilevit v2 (linear attention)": (
        hf("MobileViTV2ForImageClassification", "MobileViTV2Config", lambda: image(64), image_size=64,
           width_multiplier=0.5),
        """
        mobilevitv2.conv_stem.convolution = stem
        mobilevitv2.encoder.layer.1.layer.1.expand_1x1.convolution = up
        mobilevitv2.encoder.layer.1.layer.1.reduce_1x1.convolution = down
        *.ffn.conv1.convolution = up
        *.ffn.conv2.convolution = down
        classifier = head
        """,
    ),
    "detr": (
        hf("DetrForObjectDetection", "DetrConfig", lambda: image(64, 1), **TWO_SIDED, num_queries=5, **RESNET),
        BACKBONE + PROJECTED + CROSS
        + "class_labels_classifier = head\n bbox_predictor.layers.2 = head",
    ),
    "conditional detr": (
        hf("ConditionalDetrForObjectDetection", "ConditionalDetrConfig", lambda: image(64, 1), **TWO_SIDED,
           num_queries=5, **RESNET),
        BACKBONE
        + """
        # The first layer's content is zero: there the learned queries' own weights make q and k.
        model.decoder.layers.1.self_attn.[qk]_pos_proj = -
        model.decoder.layers.0.self_attn.q_pos_proj = q
        model.decoder.layers.0.self_attn.k_pos_proj = k
        *.encoder_attn.q_pos_proj = q      # on positions learned for the queries, in the first layer only
        *.encoder_attn.k_pos_proj = -
        *.q_content_proj = q
        *.k_content_proj = k
        *.encoder_attn.q_pos_sine_proj = q
        class_labels_classifier = head
        bbox_predictor.layers.2 = head
        position model.decoder.layers.1.self_attn.[qk]_pos_proj
        position *.encoder_attn.k_pos_proj
        cross *.encoder_attn.k_pos_proj
        """ + PROJECTED + CROSS,
    ),
    "deformable detr (sampled attention)": (
        hf("DeformableDetrForObjectDetection", "DeformableDetrConfig", lambda: image(64, 1), **TWO_SIDED,
           num_queries=5, num_feature_levels=2,
           **{**RESNET, "backbone_config": {**RESNET["backbone_config"], "out_features": ["stage1", "stage2"]}}),
        # It multiplies probabilities of a weight's own with sampled values: there is no key.
        BACKBONE
        + "*.encoder_attn.* = -\n model.encoder.layers.*.self_attn.* = -"
        + no(PROJECTED, "? *.encoder_attn")
        + """
        class_embed.* = head
        bbox_embed.*.layers.2 = head
        """,
    ),
    "perceiver": (
        hf("PerceiverModel", "PerceiverConfig", lambda: {"inputs": normal(2, 12, 16)}, num_latents=6,
           d_latents=32, d_model=16, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4,
           num_cross_attention_heads=2),
        no(VIT, "classifier", "*patch", "? *.mlp").replace(".attention.attention.", ".attention.self.")
        + """
        *.mlp.dense1 = up
        *.mlp.dense2 = down
        cross encoder.cross_attention.attention.self.*
        """,
    ),
    "blip-2 q-former": (
        hf("Blip2QFormerModel", "Blip2QFormerConfig",
           lambda: {"query_embeds": normal(2, 4, 32), "encoder_hidden_states": normal(2, 6, 24)}, **PLAIN,
           encoder_hidden_size=24, cross_attention_frequency=1),
        """
        *attention.attention.query = q
        *attention.attention.key = k
        *attention.attention.value = v
        *attention.output.dense = o
        *.intermediate_query.dense = up
        *.output_query.dense = down
        cross *.crossattention.attention.*
        """,
    ),
    "lxmert": (
        hf("LxmertModel", "LxmertConfig",
           lambda: {"input_ids": ids(), "visual_feats": normal(2, 5, 12), "visual_pos": normal(2, 5, 4)},
           **PLAIN, l_layers=1, x_layers=1, r_layers=1, visual_feat_dim=12),
        """
        *.visual_attention.att.query = q
        *.visual_attention.att.key = k
        *.visual_attention.att.value = v
        *.visual_attention.output.dense = o
        *_self_att.self.query = q
        *_self_att.self.key = k
        *_self_att.self.value = v
        *_self_att.output.dense = o
        *_inter.dense = up
        *_output.dense = down
        encoder.visn_fc.* = stem
        cross *.visual_attention.att.*
        """ + BERT,
    ),
    "vilt": (
        hf("ViltModel", "ViltConfig", lambda: {**text(), **image()}, **PLAIN),
        "*.patch_embeddings.projection = stem"
        + no(VIT, "*patch", "classifier")
        + """
        *.text_embeddings.*_embeddings = embedding
        embeddings.token_type_embeddings = embedding
        pooler.dense = head
        """,
    ),
    "clip": (
        hf("CLIPModel", "CLIPConfig", lambda: {**text(), **image()}, projection_dim=16,
           text_config={**PLAIN, "projection_dim": 16}, vision_config={**PLAIN, "projection_dim": 16}),
        "*.patch_embedding = stem\n *_embedding = embedding\n *_projection = head" + PROJECTED,
    ),
    "siglip": (
        hf("SiglipModel", "SiglipConfig", lambda: {**text(), **image()}, text_config=PLAIN, vision_config=PLAIN),
        """
        *.patch_embedding = stem
        *_embedding = embedding
        text_model.head = head
        vision_model.head.attention.in_proj_weight = q[0:32] k[32:64] v[64:96]
        vision_model.head.attention.out_proj = o
        cross vision_model.head.attention.*
        """ + PROJECTED,
    ),
    "groupvit (grouping)": (
        hf("GroupViTVisionModel", "GroupViTVisionConfig", image, **PLAIN, depths=[1, 1],
           num_group_tokens=[4, 0], num_output_groups=[4, 2]),
        """
        *.patch_embeddings.projection = stem
        *.mlp_inter.* = -
        *.k_proj = k
        *.v_proj = v
        *.q_proj = q
        *.out_proj = o
        *.assign.proj = o
        *.fc1 = up
        *.fc2 = down
        cross *.pre_assign_attn.attn.[kvq]_proj
        cross *.assign.[kvq]_proj
        """,
    ),
    "segment anything (transformers)": (
        hf("SamModel", "SamConfig",
           lambda: {"pixel_values": normal(1, 3, 32, 32), "input_points": torch.full((1, 1, 1, 2), 9.0)},
           vision_config={
               "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
               "image_size": 32, "patch_size": 8, "window_size": 2, "global_attn_indexes": [1],
               "mlp_dim": 64, "num_pos_feats": 8},
           prompt_encoder_config={
               "hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4,
               "num_point_embeddings": 4, "image_embedding_size": 4},
           mask_decoder_config={
               "hidden_size": 16, "mlp_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
               "attention_downsample_rate": 2, "iou_head_hidden_dim": 16}),
        """
        *.attn.qkv = q[0:32] k[32:64] v[64:96]
        *.attn.proj = o
        *.q_proj = q
        *.k_proj = k
        *.v_proj = v
        *.out_proj = o
        *.mlp.lin1 = up
        *.mlp.lin2 = down
        vision_encoder.patch_embed.projection = stem
        *.positional_embedding = stem      # multiplies the points' coordinates
        mask_decoder.output_hypernetworks_mlps.*.proj_out = head
        mask_decoder.iou_prediction_head.proj_out = head
        mask_decoder.upscale_conv2 = head
        cross *_attn_token_to_image.[qkv]_proj
        cross *_attn_image_to_token.[qkv]_proj
        """,
    ),
}  # fmt: skip

TRUTHS = truths(TABLE)
