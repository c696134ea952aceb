"""The truth of timm's convolutional, hybrid and attention-free models, read from the sources of timm 1.0."""

from __future__ import annotations

from tests.zoo.roles_models import vit
from tests.zoo.roles_truth import truths
from tests.zoo.roles_truth_timm import BY_HEAD, FEED_FORWARD, thirds

TABLE = {
    "efficientformer": (
        vit("efficientformer_l1"),
        """
        stem.conv1 = stem
        *.token_mixer.qkv = q[0:32/192] k[32:64/192] v[64:192/192]
        *.token_mixer.proj = o
        head = head
        head_dist = head
        """
        + FEED_FORWARD,
    ),
    "efficientformer v2 (talking heads)": (
        vit("efficientformerv2_s0"),
        """
        stem.conv1.conv = stem
        *.token_mixer.q.conv = q
        *.token_mixer.k.conv = k
        *.token_mixer.v.conv = v
        *.token_mixer.proj.conv = o
        *.attn.q.proj.conv = q      # of a local convolution's result, which is added to a pool
        *.attn.k.conv = k
        *.attn.v.conv = v
        *.attn.proj.conv = o
        *.mlp.fc1.conv = up
        *.mlp.fc2.conv = down
        head = head
        head_dist = head
        """,
    ),
    "edgenext (channels)": (
        vit("edgenext_xx_small"),
        "stem.0 = stem\n *.xca.proj = o\n head.fc = head\n"
        + thirds(("stages.1.*.xca.qkv", 48), ("stages.2.*.xca.qkv", 88), ("stages.3.*.xca.qkv", 168))
        + FEED_FORWARD,
    ),
    "mvit v2 (pooled)": (
        vit("mvitv2_tiny"),
        "patch_embed.proj = stem\n *.attn.proj = o\n head.fc = head\n"
        + thirds(
            ("stages.0.blocks.*.attn.qkv", 96),
            ("stages.1.blocks.*.attn.qkv", 192),
            ("stages.2.blocks.*.attn.qkv", 384),
            ("stages.3.blocks.*.attn.qkv", 768),
        )
        + FEED_FORWARD,
    ),
    "nest (blocks)": (
        vit("nest_tiny_jx"),
        "patch_embed.proj = stem\n *.attn.proj = o\n head = head\n"
        + thirds(*((f"levels.{i}.*.attn.qkv", w) for i, w in enumerate((96, 192, 384))))
        + FEED_FORWARD,
    ),
    "gcvit (global queries)": (
        vit("gcvit_xxtiny"),
        """
        stem.conv1 = stem
        stages.0.blocks.1.attn.qkv = k[0:64] v[64:128]
        stages.1.blocks.1.attn.qkv = k[0:128] v[128:256]
        stages.2.blocks.[135].attn.qkv = k[0:256] v[256:512]
        stages.3.blocks.[135].attn.qkv = k[0:512] v[512:1024]
        *.attn.proj = o
        head.fc = head
        """
        + thirds(*((f"stages.{i}.*.attn.qkv", w) for i, w in enumerate((64, 128, 256, 512))))
        + FEED_FORWARD,
    ),
    "volo (outlooking)": (
        vit("volo_d1_224"),
        """
        patch_embed.conv.0 = stem
        network.0.* = -
        *.attn.qkv = q[0:384] k[384:768] v[768:1152]
        *.attn.q = q
        *.attn.kv = k[0:384] v[384:768]
        *.attn.proj = o
        head = head
        aux_head = head
        """.replace("network.0.* = -", "network.0.*.attn.* = -")
        + FEED_FORWARD,
    ),
    "mobilenet v4 hybrid (multi-query)": (
        vit("mobilenetv4_hybrid_medium", 128),
        """
        conv_stem = stem
        *.attn.query.proj = q
        *.attn.key.proj = k
        *.attn.value.proj = v
        *.attn.output.proj = o
        blocks.1.0.* = -      # these narrow or widen
        blocks.2.0.* = -
        blocks.3.0.* = -
        *.pw_exp.conv = up
        *.pw_proj.conv = down
        classifier = head
        """,
    ),
    "efficientvit, msra (cascaded)": (
        vit("efficientvit_m0"),
        """
        patch_embed.conv1.conv = stem
        stages.0.*.qkvs.*.conv = q[0:16] k[16:32] v[32:48]
        stages.1.*.qkvs.*.conv = q[0:16] k[16:32] v[32:64]
        stages.2.*.qkvs.*.conv = q[0:16] k[16:32] v[32:80]
        *.attn.proj.1.conv = o
        *.pw1.conv = up
        *.pw2.conv = down
        head.linear = head
        """,
    ),
    "efficientvit, mit (linear attention)": (
        vit("efficientvit_b0"),
        """
        stem.in_conv.conv = stem
        stages.0.blocks.1.main.inverted_conv.conv = up
        stages.0.blocks.1.main.point_conv.conv = down
        stages.1.blocks.1.main.inverted_conv.conv = up
        stages.1.blocks.1.main.point_conv.conv = down
        *.local_module.main.inverted_conv.conv = up
        *.local_module.main.point_conv.conv = down
        head.classifier.4 = head
        """,
    ),
    "hiera": (
        vit("hiera_tiny_224", embed_dim=16, stages=(1, 1, 1, 1)),
        "patch_embed.proj = stem\n *.attn.proj = o\n head.fc = head\n"
        + thirds(*((f"blocks.{i}.attn.qkv", 16 * 2**i) for i in range(4)))
        + FEED_FORWARD,
    ),
    "tiny_vit (by head)": (
        vit("tiny_vit_5m_224"),
        f"""
        patch_embed.conv1.conv = stem
        stages.0.blocks.*.conv1.conv = up
        stages.0.blocks.*.conv3.conv = down
        *.attn.qkv = {BY_HEAD}
        *.attn.proj = o
        head.fc = head
        """
        + FEED_FORWARD,
    ),
    "pit": (
        vit("pit_ti_224"),
        "patch_embed.conv = stem\n *.attn.proj = o\n head = head\n"
        + thirds(*((f"transformers.{i}.blocks.*.attn.qkv", w) for i, w in enumerate((64, 128, 256))))
        + FEED_FORWARD,
    ),
    "caformer": (
        vit("caformer_s18", 128),
        """
        stem.conv = stem
        *.token_mixer.qkv = -
        *.token_mixer.proj = o
        head.fc.fc2 = head
        """.replace("*.token_mixer.qkv = -\n", "")
        + thirds(("stages.2.*.token_mixer.qkv", 320), ("stages.3.*.token_mixer.qkv", 512))
        + FEED_FORWARD,
    ),
    "botnet": (
        vit("botnet26t_256"),
        # The attention has no projection of its own: the bottleneck's last convolution is it.
        """
        stem.conv1.conv = stem
        head.fc = head
        stages.2.1.conv3_1x1.conv = o
        stages.3.*.conv3_1x1.conv = o
        """
        + thirds(("stages.2.*.self_attn.qkv", 256), ("stages.3.*.self_attn.qkv", 512)),
    ),
    "halonet (by head)": (
        vit("halonet26t"),
        """
        stem.conv1.conv = stem
        *.self_attn.q = q
        stages.2.*.self_attn.kv = k[0:32/64] v[32:64/64]
        stages.3.*.self_attn.kv = k[0:64/128] v[64:128/128]
        stages.2.1.conv3_1x1.conv = o      # as in botnet
        stages.3.*.conv3_1x1.conv = o
        head.fc = head
        """,
    ),
    "resnet, attention pooling": (
        vit("resnet50_clip", 64),
        """
        stem.conv1.conv = stem
        head.q = q
        head.k = k
        head.v = v
        head.proj = o head
        """,
    ),
    "lambda networks (no attention)": (
        vit("lambda_resnet26t"), "stem.conv1.conv = stem\n head.fc = head"
    ),
    "swiftformer (additive attention)": (
        vit("swiftformer_xs"),
        """
        stem.0 = stem
        *.pwconv1 = up
        *.pwconv2 = down
        *.linear.fc1 = up
        *.linear.fc2 = down
        head = head
        head_dist = head
        """,
    ),
    "mlp-mixer": (
        vit("mixer_s32_224"),
        """
        stem.proj = stem
        *.mlp_tokens.fc1 = up
        *.mlp_tokens.fc2 = down
        *.mlp_channels.fc1 = up
        *.mlp_channels.fc2 = down
        head = head
        """,
    ),
    "gmlp (spatial gates)": (
        vit("gmlp_s16_224"),
        "stem.proj = stem\n *.mlp_channels.fc1 = up\n *.mlp_channels.fc2 = down\n head = head",
    ),
    "poolformer": (
        vit("poolformer_s12", 128), "stem.conv = stem\n head.fc = head" + FEED_FORWARD
    ),
    "convnext": (vit("convnext_atto", 64), "stem.0 = stem\n head.fc = head" + FEED_FORWARD),
    "resnet": (vit("resnet18", 64), "conv1 = stem\n fc = head"),
}  # fmt: skip

TRUTHS = truths(TABLE)
