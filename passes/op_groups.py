"""Groups of canonical operations that the analyses of dataflow tell apart."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PRODUCTS: dict[str, int] = {
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "inner", "tensordot", "linear"), 0),
    **dict.fromkeys(("einsum", "baddbmm", "addbmm", "addmm"), 1),
}
"""Products of two tensors, with the position of the first factor among the arguments."""

FUSED_ATTENTION = _words(
    """
    flex_attention scaled_dot_product_attention scaled_dot_product_attention_math
    scaled_dot_product_flash_attention scaled_dot_product_flash_attention_for_cpu
    scaled_dot_product_efficient_attention scaled_dot_product_cudnn_attention
    scaled_dot_product_fused_attention_overrideable
    """
)
"""Calls that are a whole attention: their first three arguments are query, key and value."""

WHOLE_ATTENTION = _words("multi_head_attention_forward")
"""Calls that hold an attention's weights too."""

SOFTMAX = _words("softmax softmax_ safe_softmax softmin gumbel_softmax")

EXPONENTIALS = _words("exp exp_ exp2 exp2_")

INVERSES = _words("reciprocal reciprocal_ rdiv")
"""What turns a sum into a factor: ``1 / x``."""

TRANSPARENT_TO_SCORES = _words(
    """
    add add_ sub sub_ rsub mul mul_ div div_ rdiv neg where masked_fill masked_fill_ clamp clamp_ tanh
    sigmoid clamp_min clamp_max nan_to_num to float half bfloat16 double type type_as clone contiguous detach
    data after view view_as unsafe_view reshape flatten unflatten permute transpose swapaxes movedim t T mT
    squeeze unsqueeze expand expand_as repeat tile repeat_interleave getitem select narrow slice alias split
    split_with_sizes chunk unbind stack cat concat pad constant_pad_nd roll flip gather index index_select
    index_put index_put_ diagonal unfold as_strided as_strided_scatter setitem copy_ fill_ scatter scatter_
    masked_scatter tril triu dropout dropout_ dropout2d feature_dropout alpha_dropout amax max maximum minimum
    reciprocal identity
    """
)
"""What may stand between a product and its softmax, or between a softmax and its product."""

HEAD_MIXING = _words("batch_norm native_batch_norm")
"""What may besides stand beside a weight that mixes an attention's heads."""

NORMS = _words("layer_norm group_norm rms_norm instance_norm")

FACTORIES = _words(
    """
    zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full
    new_tensor new_empty_strided arange zeros ones empty full
    """
)
"""Makers of tensors whose values do not come from their arguments."""

SUMS = _words("add add_ sub sub_ rsub addcmul addcmul_ addcdiv lerp")
"""Sums of two activations: where a residual stream joins."""

SCALINGS = _words("mul mul_")

JOINS = _words("cat concat concatenate")
"""What puts values side by side."""

CASTS = _words("to float half bfloat16 double type type_as")

DETACHES = _words("detach detach_ data")

BOUNDS = _words("clamp clamp_ clip clip_ clamp_min clamp_min_ clamp_max clamp_max_")
"""What keeps values between two bounds: which channels pass does not depend on where those lie."""

LOOK_UPS = _words("embedding embedding_bag")

SELECTIONS = _words("topk argmax sort argsort max multinomial")
"""What chooses by value."""

ACTIVATIONS = _words(
    """
    relu relu_ relu6 gelu silu silu_ mish hardswish hardtanh hardtanh_ leaky_relu leaky_relu_ elu elu_ selu
    celu prelu rrelu softplus softsign sigmoid sigmoid_ hardsigmoid tanh tanh_ erf logsigmoid threshold
    expm1 glu
    """
)
"""Elementwise functions that bend; composite ones (a hand-written GELU or SiLU) are made of these."""

ELEMENTWISE = _words(
    """
    add add_ sub sub_ rsub mul mul_ div div_ rdiv neg where masked_fill masked_fill_ clamp tanh sigmoid
    softmax to float half bfloat16 double type type_as clone contiguous dropout dropout_ nan_to_num relu relu_
    gelu silu silu_ hardswish pow square sqrt rsqrt reciprocal exp abs maximum minimum
    """
)
"""What acts on every element by itself, and softmax."""

KEEPS_CHANNELS = (ELEMENTWISE - _words("where masked_fill masked_fill_ maximum minimum softmax")) | (
    ACTIVATIONS - _words("glu threshold")
    | NORMS
    | HEAD_MIXING
    | _words(
        """
        view unsafe_view reshape flatten unflatten permute transpose swapaxes movedim t T mT squeeze unsqueeze
        expand expand_as repeat repeat_interleave mean norm var cat concat stack conv1d conv2d conv3d
        dropout2d feature_dropout detach data roll normalize
        """
    )
)
"""What lets every channel of its argument through to its result."""

MIXTURES = _words("cumsum cumprod sum exp conv1d conv2d conv3d logcumsumexp")
"""Scans and sums over positions: never part of a feed-forward block."""
