# SPDX-License-Identifier: MIT
"""The same diffusion block before there was a fused function: two functions without a bias, the dilation always given."""

import natten.functional
from consumers import hdit

INPUT_SHAPES = hdit.INPUT_SHAPES


class SelfAttention(hdit.SelfAttention):
    """Heads first, as the old functions want them."""

    def attend(self, query, key, value):
        query, key, value = (t.permute(0, 3, 1, 2, 4) for t in (query, key, value))
        weights = natten.functional.natten2dqk(query, key, self.kernel_size, 1).softmax(dim=-1)
        return natten.functional.natten2dav(weights, value, self.kernel_size, 1).permute(0, 2, 3, 1, 4)


def build(attention=SelfAttention):
    return hdit.Block(24, 5, attention)
