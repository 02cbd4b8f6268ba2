# SPDX-License-Identifier: MIT
"""The same Dinat as it was for the first releases: no kernel size is given, it is read off the bias and the weights."""

from consumers import dinat
from natten.functional import natten2dav, natten2dqkrpb

INPUT_SHAPES = dinat.INPUT_SHAPES


class NeighborhoodAttention(dinat.NeighborhoodAttention):
    """The fourth argument of the scores and the third of the values are the dilation."""

    def attend(self, query, key, value):
        weights = natten2dqkrpb(query, key, self.rpb, self.dilation).softmax(dim=-1)
        return natten2dav(weights, value, self.dilation)


def build(attention=NeighborhoodAttention):
    return dinat.Dinat(attention)
