"""The truth of timm's vision models: what their weights do, read from the sources of timm 1.0."""

from __future__ import annotations

from tests.zoo.roles_models import SMALL_SWIN, SMALL_VIT, vit
from tests.zoo.roles_truth import truths

FEED_FORWARD = """
    *.mlp.fc1 = up
    *.mlp.fc2 = down
"""
VIT = (
    """
    patch_embed.proj = stem
    *.attn.qkv = q[0:32] k[32:64] v[64:96]
    *.attn.proj = o
    head = head
"""
    + FEED_FORWARD
)
SWIN = (
    """
    patch_embed.proj = stem
    *s.0.blocks.*.attn.qkv = q[0:16] k[16:32] v[32:48]
    *s.1.blocks.*.attn.qkv = q[0:32] k[32:64] v[64:96]
    *.attn.proj = o
    head.fc = head
"""
    + FEED_FORWARD
)
BY_HEAD = "q[0:32/96] k[32:64/96] v[64:96/96]"
CLASS_ATTENTION = """
    *.attn.q = q
    *.attn.k = k
    *.attn.v = v
"""


def thirds(*stages: tuple[str, int]) -> str:
    """Lines for a fused q, k, v of each stage's width."""
    return "\n".join(f"{p} = q[0:{w}] k[{w}:{2 * w}] v[{2 * w}:{3 * w}]" for p, w in stages) + "\n"


TABLE = {
    "vit": (vit("vit_tiny_patch16_224", **SMALL_VIT), VIT),
    "vit, attention pooling": (
        vit("vit_base_patch16_siglip_224", **SMALL_VIT),
        VIT
        + """
        attn_pool.q = q
        attn_pool.kv = k[0:32] v[32:64]
        attn_pool.proj = o
        cross attn_pool.q
        cross attn_pool.kv
        """,
    ),
    "vit, parallel branches": (
        vit("vit_small_patch16_18x2_224", **SMALL_VIT),
        VIT.replace("*.attn.", "*.attns.*.attn.").replace("*.mlp.", "*.ffns.*.mlp."),
    ),
    "vit, one fused input": (
        vit("vit_base_patch32_plus_256", **SMALL_VIT, block_fn="parallel"),
        """
        patch_embed.proj = stem
        *.in_proj = up[0:128] q[128:160] k[160:192] v[192:224]
        *.attn_out_proj = o
        *.mlp_out_proj = down
        head = head
        """,
    ),
    "vit, relative positions by mlp": (
        vit("vit_relpos_small_patch16_rpn_224", **SMALL_VIT),
        "*.rel_pos.* = -" + VIT + "position *.rel_pos.mlp.fc2",
    ),
    "vit, differential attention": (vit("vit_dlittle_patch16_reg1_gap_256", **SMALL_VIT), VIT),
    "deit, distilled": (vit("deit_tiny_distilled_patch16_224", **SMALL_VIT), VIT + "head_dist = head"),
    "deit3": (vit("deit3_small_patch16_224", **SMALL_VIT), VIT),
    "vit, dinov3": (
        vit("vit_small_patch16_dinov3", 64, **SMALL_VIT, img_size=64), VIT
    ),
    "beit": (vit("beit_base_patch16_224", **SMALL_VIT), VIT),
    "eva (rotary)": (vit("eva_giant_patch14_224", **SMALL_VIT), VIT),
    "eva02 (gated, rotary)": (
        vit("eva02_tiny_patch14_224", **SMALL_VIT),
        VIT.replace("*.mlp.fc1 = up", "*.mlp.fc1 = gate[0:85] up[85:170]"),
    ),
    "segment anything": (
        vit("samvit_base_patch16", 64, **SMALL_VIT, global_attn_indexes=(1,), img_size=64),
        VIT.replace("head = head", "head.fc = head"),
    ),
    "naflexvit": (
        vit("naflexvit_base_patch16_gap", 224, **SMALL_VIT), VIT.replace("patch_embed.proj", "embeds.proj")
    ),
    "swin": (vit("swin_tiny_patch4_window7_224", **SMALL_SWIN), SWIN),
    "swin v2 (cosine)": (
        vit("swinv2_tiny_window8_256", **SMALL_SWIN), SWIN + "position *.cpb_mlp.2"
    ),
    "swin v2 cr": (vit("swinv2_cr_tiny_224", **SMALL_SWIN), SWIN + "position *.meta_mlp.fc2"),
    "levit (by head)": (
        vit("levit_128s"),
        """
        stem.conv1.linear = stem
        *.qkv.linear = q[0:16/64] k[16:32/64] v[32:64/64]
        *.downsample.attn_downsample.q.* = q
        *.attn_downsample.kv.linear = k[0:16/80] v[16:80/80]
        *.proj.*linear = o
        *.mlp.ln1.linear = up
        *.mlp.ln2.linear = down
        head.linear = head
        head_dist.linear = head
        """,
    ),
    "maxvit (windows and grid)": (
        vit("maxvit_rmlp_pico_rw_256"),
        f"""
        stem.conv1 = stem
        stages.[123].blocks.0.conv.conv* = -      # widens: its shortcut has a weight too
        *.conv.conv1_1x1 = up
        *.conv.conv3_1x1 = down
        *.attn.rel_pos.mlp.* = -
        *.attn.qkv = {BY_HEAD}
        *.attn.proj = o
        head.fc = head
        position *.attn.rel_pos.mlp.fc2
        """
        + FEED_FORWARD,
    ),
    "coatnet": (
        vit("coatnet_pico_rw_224"),
        f"""
        stem.conv1 = stem
        stages.[1].blocks.0.conv* = -
        *.conv1_1x1 = up
        *.conv3_1x1 = down
        *.attn.qkv = {BY_HEAD}
        *.attn.proj = o
        head.fc = head
        """
        + FEED_FORWARD,
    ),
    "pvt v2": (
        vit("pvt_v2_b0"),
        """
        patch_embed.proj = stem
        *.attn.q = q
        stages.0.*.attn.kv = k[0:32] v[32:64]
        stages.1.*.attn.kv = k[0:64] v[64:128]
        stages.2.*.attn.kv = k[0:160] v[160:320]
        stages.3.*.attn.kv = k[0:256] v[256:512]
        *.attn.proj = o
        head = head
        """
        + FEED_FORWARD,
    ),
    "twins svt": (
        vit("twins_svt_small"),
        """
        patch_embeds.0.proj = stem
        *.attn.q = q
        blocks.0.*.attn.kv = k[0:64] v[64:128]
        blocks.1.*.attn.kv = k[0:128] v[128:256]
        blocks.2.*.attn.kv = k[0:256] v[256:512]
        blocks.3.*.attn.kv = k[0:512] v[512:1024]
        *.attn.proj = o
        head = head
        """
        + thirds(*((f"blocks.{i}.*.attn.qkv", w) for i, w in enumerate((64, 128, 256, 512))))
        + FEED_FORWARD,
    ),
    "xcit (channels)": (
        vit("xcit_nano_12_p16_224", depth=2),
        """
        patch_embed.proj.0.0 = stem
        *.attn.qkv = q[0:128] k[128:256] v[256:384]
        *.attn.proj = o
        head = head
        """
        + CLASS_ATTENTION
        + FEED_FORWARD,
    ),
    "davit (windows and channels)": (
        vit("davit_tiny", depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4)),
        # Between channels the source softmaxes kᵀv and weighs q with it: q, k, v here are by function.
        """
        stem.conv = stem
        stages.0.blocks.0.0.attn.qkv = q[0:16] k[16:32] v[32:48]
        stages.0.blocks.0.1.attn.qkv = q[16:32] k[32:48] v[0:16]
        stages.1.blocks.0.0.attn.qkv = q[0:32] k[32:64] v[64:96]
        stages.1.blocks.0.1.attn.qkv = q[32:64] k[64:96] v[0:32]
        *.attn.proj = o
        head.fc = head
        """
        + FEED_FORWARD,
    ),
    "cait (talking heads)": (
        vit("cait_xxs24_224", depth=2, embed_dim=32, num_heads=4), VIT + CLASS_ATTENTION
    ),
    "crossvit": (
        vit("crossvit_tiny_240"),
        """
        patch_embed.*.proj = stem
        blocks.*.blocks.0.*.attn.qkv = q[0:96] k[96:192] v[192:288]
        blocks.*.blocks.1.*.attn.qkv = q[0:192] k[192:384] v[384:576]
        *.attn.wq = q
        *.attn.wk = k
        *.attn.wv = v
        *.attn.proj = o
        head.* = head
        """
        + FEED_FORWARD,
    ),
    "coat (linear attention)": (
        vit("coat_tiny"), "patch_embed1.proj = stem\n head = head\n *.mlp*.fc1 = up\n *.mlp*.fc2 = down"
    ),
    "convit (gated positions)": (
        vit("convit_tiny", depth=3, local_up_to_layer=2, embed_dim=32, num_heads=4),
        """
        patch_embed.proj = stem
        *.attn.qk = q[0:128] k[128:256]
        *.attn.v = v
        *.attn.qkv = q[0:128] k[128:256] v[256:384]
        *.attn.proj = o
        head = head
        """
        + FEED_FORWARD,
    ),
    "visformer (convolutions)": (
        vit("visformer_tiny"),
        """
        stem.0 = stem
        stage1.* = -      # a grouped 3 x 3 convolution between
        *.attn.proj = o
        *.mlp.conv1 = up
        *.mlp.conv3 = down
        head = head
        """
        + thirds(("stage2.*.attn.qkv", 192), ("stage3.*.attn.qkv", 384)),
    ),
    "tnt (inner and outer)": (
        vit("tnt_s_legacy_patch16_224", depth=2),
        """
        pixel_embed.proj = stem
        *.attn_in.qk = q[0:24] k[24:48]
        *.attn_out.qk = q[0:384] k[384:768]
        *.attn_*.v = v
        *.attn_*.proj = o
        *.mlp_in.fc1 = up
        *.mlp_in.fc2 = down
        head = head
        """
        + FEED_FORWARD,
    ),
}  # fmt: skip

TRUTHS = truths(TABLE)
